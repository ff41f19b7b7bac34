"""Cascade Mask R-CNN on NAT-Tiny, COCO, 36 epochs: the authors' recipe."""

_base_ = "../_base_/cascade-mask-rcnn_3x_coco.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(backbone=dict(name="nat_tiny", drop_path_rate=0.3), neck=dict(in_channels=[64, 128, 256, 512]))
