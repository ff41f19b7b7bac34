"""EuroSAT, 10 kinds of land use at 64x64: {train,val,test}/CLASS/NAME.jpg."""

data_root = "data/eurosat64"
metainfo = dict(
    classes=(
        "AnnualCrop",
        "Forest",
        "HerbaceousVegetation",
        "Highway",
        "Industrial",
        "Pasture",
        "PermanentCrop",
        "Residential",
        "River",
        "SeaLake",
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
            input_size=64,
            is_training=True,
            interpolation="bicubic",
            scale=(0.5, 1.0),
            hflip=0.5,
            vflip=0.5,
            color_jitter=0.2,
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
        transform=dict(input_size=64, crop_pct=1.0, interpolation="bicubic"),
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
        transform=dict(input_size=64, crop_pct=1.0, interpolation="bicubic"),
    ),
)
val_evaluator = dict(type="ClassificationAccuracy")
test_evaluator = val_evaluator
