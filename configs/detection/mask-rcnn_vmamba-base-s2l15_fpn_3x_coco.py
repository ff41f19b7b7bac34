"""Mask R-CNN on VMamba-B (s2l15), COCO, 36 epochs: the recipe of T and S, because none is published for B."""

_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(
        _delete_=True, type="TerrazzoBackbone", pretrained=True, name="vmamba_base_s2l15", drop_path_rate=0.6
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
