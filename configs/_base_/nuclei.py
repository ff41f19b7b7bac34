"""Cell nuclei, boxes and masks of one class: images/{train,val,test}/, annotations/instances_{train,val,test}.json."""

dataset_type = "CocoDataset"
data_root = "data/nuclei"
metainfo = dict(classes=("nucleus",), palette=[(220, 20, 60)])
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomResize", scale=(768, 768), ratio_range=(0.75, 1.25), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(768, 768), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    batch_sampler=dict(type="AspectRatioBatchSampler"),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="images/train/"),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="images/val/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/instances_test.json",
        data_prefix=dict(img="images/test/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
# An image has up to 375 nuclei. pycocotools always computes "mAP" over the 100 best boxes, so it is left out: the
# precision of the single class, at 400 boxes, is the mean average precision here.
val_evaluator = dict(
    type="CocoMetric",
    ann_file=data_root + "/annotations/instances_val.json",
    metric=["bbox", "segm"],
    metric_items=["mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l"],
    proposal_nums=(1, 100, 400),
    classwise=True,
)
test_evaluator = dict(
    type="CocoMetric",
    ann_file=data_root + "/annotations/instances_test.json",
    metric=["bbox", "segm"],
    metric_items=["mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l"],
    proposal_nums=(1, 100, 400),
    classwise=True,
)
