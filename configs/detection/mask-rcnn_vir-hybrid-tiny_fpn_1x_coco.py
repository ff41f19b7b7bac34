"""Mask R-CNN on ViR-hybrid-tiny, COCO, 12 epochs: mmdet's 1x with AdamW.

There are no weights: train a classifier first, and name its file as `model.backbone.checkpoint`.
"""

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/adamw_1x_coco.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(_delete_=True, type="TerrazzoBackbone", name="vir_hybrid_tiny", drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
sync_bn = "torch"
