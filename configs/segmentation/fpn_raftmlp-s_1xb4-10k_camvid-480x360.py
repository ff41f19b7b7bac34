"""Semantic FPN on RaftMLP-S, CamVid: one process, batch 4, 10000 iterations."""

_base_ = [
    "mmseg::_base_/models/fpn_r50.py",
    "mmseg::_base_/default_runtime.py",
    "../_base_/camvid.py",
    "../_base_/adamw_10k.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(_delete_=True, type="TerrazzoBackbone", name="raftmlp_s", drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 256, 512]),
    decode_head=dict(num_classes=11, norm_cfg=dict(type="BN")),
)
