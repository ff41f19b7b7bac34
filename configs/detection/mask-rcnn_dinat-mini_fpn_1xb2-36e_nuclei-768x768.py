"""Mask R-CNN on DiNAT-Mini, cell nuclei: one process, batch 2, 36 epochs; up to 400 nuclei an image."""

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/default_runtime.py",
    "../_base_/nuclei.py",
    "../_base_/adamw_36e.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(_delete_=True, type="TerrazzoBackbone", name="dinat_mini", drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
    rpn_head=dict(anchor_generator=dict(scales=[4])),
    roi_head=dict(bbox_head=dict(num_classes=1), mask_head=dict(num_classes=1)),
    train_cfg=dict(rpn_proposal=dict(max_per_img=2000)),
    test_cfg=dict(rpn=dict(nms_pre=2000, max_per_img=2000), rcnn=dict(max_per_img=400)),
)
default_hooks = dict(checkpoint=dict(interval=3, max_keep_ckpts=2, save_best="coco/segm_mAP_50"))
