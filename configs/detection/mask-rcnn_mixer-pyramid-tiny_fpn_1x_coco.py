"""Mask R-CNN on the mixer pyramid with LLSA in its first two stages, COCO, 12 epochs: mmdet's 1x with AdamW.

No weights are public: train a classifier first, and name its file as `model.backbone.checkpoint`.
"""

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/adamw_1x_coco.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(_delete_=True, type="TerrazzoBackbone", name="mixer_pyramid_tiny", drop_path_rate=0.0),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
sync_bn = "torch"
