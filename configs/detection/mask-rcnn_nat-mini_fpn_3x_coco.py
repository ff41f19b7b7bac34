"""Mask R-CNN on NAT-Mini, COCO, 36 epochs: the authors' recipe."""

_base_ = "../_base_/mask-rcnn_3x_coco.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(backbone=dict(name="nat_mini", drop_path_rate=0.2), neck=dict(in_channels=[64, 128, 256, 512]))
