"""Mask R-CNN on DiNAT_s-Tiny, COCO, 36 epochs: the authors' recipe."""

_base_ = "../_base_/mask-rcnn_3x_coco.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
dilations = [[1, 28], [1, 14], [1, 3, 1, 5, 1, 7], [1, 3]]
model = dict(
    backbone=dict(name="dinat_s_tiny", drop_path_rate=0.2, dilations=dilations),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
