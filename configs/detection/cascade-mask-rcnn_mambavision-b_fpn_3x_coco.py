"""Cascade Mask R-CNN on MambaVision-B, COCO, 36 epochs: the authors' recipe."""

_base_ = "../_base_/mambavision_cascade-mask-rcnn_3x_coco.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(backbone=dict(name="mambavision_b"), neck=dict(in_channels=[128, 256, 512, 1024]))
optim_wrapper = dict(optimizer=dict(lr=2e-4))
