"""Cascade Mask R-CNN on DiNAT_s-Base, COCO, 36 epochs: the authors' recipe."""

_base_ = "../_base_/cascade-mask-rcnn_3x_coco.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
dilations = [[1, 28], [1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3]]
model = dict(
    backbone=dict(name="dinat_s_base", drop_path_rate=0.6, dilations=dilations),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(optimizer=dict(lr=7.5e-5))
