"""Semantic FPN on AttNet-XXS, ADE20K, 8 processes of batch 4, 40000 iterations: PoolFormer's recipe.

The recipe is ours: the authors published no segmentor. Fetch their weights by hand and set `model.backbone.checkpoint`.
"""

_base_ = "../_base_/fpn_40k_ade20k.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(name="attnet_xxs", drop_path_rate=0.0),
    neck=dict(in_channels=[32, 64, 128, 240]),
)
optim_wrapper = dict(paramwise_cfg=dict(flat_decay_mult=0.0))
