"""Any folder of pictures, degraded on the fly: images/{train,val}/NAME, in subfolders or not."""

data_root = "data/pictures"
degradation = dict(type="GaussianNoise", sigma=25)
train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    persistent_workers=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="DegradedPictures",
        data_root=data_root,
        split="images/train",
        degradation=degradation,
        crop=128,
        training=True,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    collate_fn=dict(type="pseudo_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="DegradedPictures", data_root=data_root, split="images/val", degradation=degradation),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="RestorationQuality")
test_evaluator = val_evaluator
