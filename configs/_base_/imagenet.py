"""ImageNet-1k as {train,val}/WNID/NAME.JPEG at 224x224, augmented as NAT and DiNAT train."""

data_root = "data/imagenet"
train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="ImageFolderDataset",
        data_root=data_root,
        split="train",
        transform=dict(
            input_size=224,
            is_training=True,
            interpolation="random",
            auto_augment="rand-m9-mstd0.5-inc1",
            re_prob=0.25,
            re_mode="pixel",
        ),
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="ImageFolderDataset",
        data_root=data_root,
        split="val",
        transform=dict(input_size=224, crop_pct=0.875, interpolation="bicubic"),
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="ClassificationAccuracy")
test_evaluator = val_evaluator
