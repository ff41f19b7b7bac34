"""Rotated RetinaNet on VMamba-T (s1l8), DOTA 1.0 in patches of 1024 pixels, 12 epochs: mmrotate's 1x with AdamW."""

_base_ = "../_base_/rotated-retinanet_1x_dota.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(_delete_=True, type="TerrazzoBackbone", pretrained=True, name="vmamba_tiny_s1l8", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
