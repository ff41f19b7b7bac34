"""Rotated RetinaNet on DiNAT-Mini, DOTA 1.0 in patches of 1024 pixels, 12 epochs: mmrotate's 1x with AdamW."""

_base_ = "../_base_/rotated-retinanet_1x_dota.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(_delete_=True, type="TerrazzoBackbone", pretrained=True, name="dinat_mini", drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
