"""Mask2Former on Cityscapes instances, 90000 iterations on crops of 512x1024, as its authors train it.

Validation uses COCO's average precision; Cityscapes' own metric is mmdet's CityScapesMetric, which needs
cityscapesscripts.
"""

_base_ = "mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py"
data_root = "data/cityscapes/"
crop_size = (512, 1024)
pad = dict(type="BatchFixedSizePad", size=crop_size, img_pad_value=0, pad_mask=True, mask_pad_value=0, pad_seg=False)
model = dict(
    data_preprocessor=dict(batch_augments=[pad]),
    panoptic_head=dict(num_things_classes=8, loss_cls=dict(class_weight=[1.0] * 8 + [0.1])),
    panoptic_fusion_head=dict(num_things_classes=8),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(
        type="RandomChoiceResize",
        scales=[int(102.4 * tenths) for tenths in range(5, 21)],
        resize_type="ResizeShortestEdge",
        max_size=4096,
    ),
    dict(type="RandomCrop", crop_size=crop_size, recompute_bbox=True, allow_negative_crop=True),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-5, 1e-5), by_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 1024), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    dataset=dict(
        type="CityscapesDataset",
        data_root=data_root,
        ann_file="annotations/instancesonly_filtered_gtFine_train.json",
        data_prefix=dict(_delete_=True, img="leftImg8bit/train/"),
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        type="CityscapesDataset",
        data_root=data_root,
        ann_file="annotations/instancesonly_filtered_gtFine_val.json",
        data_prefix=dict(_delete_=True, img="leftImg8bit/val/"),
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instancesonly_filtered_gtFine_val.json")
test_evaluator = val_evaluator
param_scheduler = dict(_delete_=True, type="PolyLR", power=0.9, eta_min=0, by_epoch=False, begin=0, end=90000)
train_cfg = dict(max_iters=90000, dynamic_intervals=None)
