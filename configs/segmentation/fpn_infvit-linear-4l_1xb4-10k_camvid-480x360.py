"""Semantic FPN on linear InfViT, CamVid: one process, batch 4, 10000 iterations; a pyramid is made of its one map.

The recipe is ours: the paper has no segmentor.
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
        name="infvit_linear_4l_patch16_224",
        out_indices=(3,),
        drop_path_rate=0.1,
    ),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=[1024], num_outs=4),
    decode_head=dict(num_classes=11, norm_cfg=dict(type="BN")),
)
