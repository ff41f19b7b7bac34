"""Photos of clothes, 10 classes at 96x96: {train,val,test}/CLASS/NAME.jpg."""

data_root = "data/clothing96"
metainfo = dict(
    classes=(
        "dress",
        "hat",
        "longsleeve",
        "outwear",
        "pants",
        "shirt",
        "shoes",
        "shorts",
        "skirt",
        "t-shirt",
    )
)
train_dataloader = dict(
    batch_size=64,
    num_workers=2,
    persistent_workers=True,
    drop_last=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="ImageFolderDataset",
        data_root=data_root,
        split="train",
        metainfo=metainfo,
        transform=dict(
            input_size=96,
            is_training=True,
            interpolation="bicubic",
            scale=(0.35, 1.0),
            hflip=0.5,
            auto_augment="rand-m7-mstd0.5-inc1",
            re_prob=0.25,
        ),
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=2,
    persistent_workers=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="ImageFolderDataset",
        data_root=data_root,
        split="val",
        metainfo=metainfo,
        transform=dict(input_size=96, crop_pct=1.0, interpolation="bicubic"),
    ),
)
test_dataloader = dict(
    batch_size=128,
    num_workers=2,
    persistent_workers=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="ImageFolderDataset",
        data_root=data_root,
        split="test",
        metainfo=metainfo,
        transform=dict(input_size=96, crop_pct=1.0, interpolation="bicubic"),
    ),
)
val_evaluator = dict(type="ClassificationAccuracy")
test_evaluator = val_evaluator
