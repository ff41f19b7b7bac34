"""Semantic FPN on AttNet-XXS with the 11 classes of CamVid, the base model of a zoom."""

_base_ = "mmseg::_base_/models/fpn_r50.py"
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=None, size_divisor=32),
    backbone=dict(_delete_=True, type="TerrazzoBackbone", name="attnet_xxs", drop_path_rate=0.0),
    neck=dict(in_channels=[32, 64, 128, 240]),
    decode_head=dict(num_classes=11, norm_cfg=dict(type="BN")),
)
