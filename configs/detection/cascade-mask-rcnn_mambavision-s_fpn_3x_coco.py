"""Cascade Mask R-CNN on MambaVision-S, COCO, 36 epochs: the authors' recipe."""

_base_ = "../_base_/mambavision_cascade-mask-rcnn_3x_coco.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(backbone=dict(name="mambavision_s"), neck=dict(in_channels=[96, 192, 384, 768]))
