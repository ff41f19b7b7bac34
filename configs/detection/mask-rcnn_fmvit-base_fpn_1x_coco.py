"""Mask R-CNN on FMViT-base, COCO, 12 epochs: mmdet's 1x with AdamW.

No weights are public: train the ImageNet config first, and name its file as `model.backbone.checkpoint`.
"""

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/adamw_1x_coco.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(_delete_=True, type="TerrazzoBackbone", name="fmvit_base", drop_path_rate=0.15),
    neck=dict(in_channels=[64, 128, 352, 608]),
)
sync_bn = "torch"
