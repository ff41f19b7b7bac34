"""Cityscapes at 256 x 128 with classes and disparities (disparity_trainvaltest.zip): 16 bits, 256 times the pixels."""

dataset_type = "CityscapesDataset"
data_root = "data/cityscapes"
crop_size = (128, 256)
load_depth = [
    dict(type="DepthBeside", replace=(("leftImg8bit", "disparity"),)),
    dict(type="LoadDepthAnnotation", depth_rescale_factor=1 / 256),
]
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    *load_depth,
    dict(type="Resize", scale=(256, 128), keep_ratio=False),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(256, 128), keep_ratio=False),
    dict(type="LoadAnnotations"),
    *load_depth,
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path="leftImg8bit/train", seg_map_path="gtFine/train"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path="leftImg8bit/val", seg_map_path="gtFine/val"),
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = val_dataloader
val_evaluator = [dict(type="IoUMetric", iou_metrics=["mIoU"]), dict(type="DepthMetric")]
test_evaluator = val_evaluator
