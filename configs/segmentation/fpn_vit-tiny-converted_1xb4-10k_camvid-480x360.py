"""Semantic FPN on ViT-tiny with Hedgehog in place of attention, CamVid: one process, batch 4, 10000 iterations.

`model.backbone.checkpoint=FILE` begins with a student that a conversion trained; `model.backbone.convert` must say what
it has.
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
        name="vit_tiny_patch16_224",
        convert=dict(mixer="hedgehog", layers="all"),
        out_indices=(11,),
        drop_path_rate=0.1,
        norm_outputs=True,
    ),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=[192], num_outs=4),
    decode_head=dict(num_classes=11, norm_cfg=dict(type="BN")),
)
