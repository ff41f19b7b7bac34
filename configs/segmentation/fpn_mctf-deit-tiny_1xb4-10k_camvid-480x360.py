"""Semantic FPN on MCTF-DeiT-tiny, CamVid: one process, batch 4, 10000 iterations.

Three times, a third of the tokens is merged by similarity and size; the last block sees every position again.
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
        name="mctf_deit_tiny_fast",
        drop_path_rate=0.0,
        out_indices=(11,),
        criteria=(1, 0, 40),
        cells_first=True,
        multiple=8,
    ),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=[192], num_outs=4),
    decode_head=dict(num_classes=11, norm_cfg=dict(type="BN")),
)
