"""Semantic FPN on DiNAT-Mini with the 11 classes of CamVid, the base model of a zoom."""

_base_ = "mmseg::_base_/models/fpn_r50.py"
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=None, size_divisor=32),
    backbone=dict(_delete_=True, type="TerrazzoBackbone", name="dinat_mini", drop_path_rate=0.0),
    neck=dict(in_channels=[64, 128, 256, 512]),
    decode_head=dict(num_classes=11, norm_cfg=dict(type="BN")),
)
