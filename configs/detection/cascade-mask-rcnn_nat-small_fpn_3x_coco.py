"""Cascade Mask R-CNN on NAT-Small, COCO, 36 epochs: the authors' recipe."""

_base_ = "../_base_/cascade-mask-rcnn_3x_coco.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(backbone=dict(name="nat_small", drop_path_rate=0.3), neck=dict(in_channels=[96, 192, 384, 768]))
