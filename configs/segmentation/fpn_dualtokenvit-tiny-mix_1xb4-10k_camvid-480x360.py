"""Semantic FPN on DualToken-ViT-T (mix), CamVid: one process, batch 4, 10000 iterations."""

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
    backbone=dict(
        _delete_=True,
        type="TerrazzoBackbone",
        name="dualtokenvit_tiny_mix",
        drop_path_rate=0.0,
        out_indices=(0, 1, 2),
    ),
    neck=dict(in_channels=[32, 96, 160], num_outs=3),
    decode_head=dict(
        in_channels=[256, 256, 256],
        in_index=[0, 1, 2],
        feature_strides=[8, 16, 32],
        num_classes=11,
        norm_cfg=dict(type="BN"),
    ),
)
