"""Semantic FPN on ViR-small, CamVid: one process, batch 4, 10000 iterations; a pyramid is made of its one map.

Retention runs over maps in four directions, so every patch sees the whole image.
"""

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
        name="vir_small_patch16_224",
        dims=2,
        directions=4,
        out_indices=(11,),
        drop_path_rate=0.1,
    ),
    neck=dict(
        _delete_=True,
        type="PlainPyramid",
        in_channels=[384],
        neck=dict(type="FPN", out_channels=256, num_outs=4),
    ),
    decode_head=dict(num_classes=11, norm_cfg=dict(type="BN")),
)
