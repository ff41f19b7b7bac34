"""Semantic FPN on FMViT-base, ADE20K, 8 processes of batch 4, 40000 iterations: PoolFormer's recipe.

No weights are public: train the ImageNet config first, and name its file as `model.backbone.checkpoint`.
"""

_base_ = "../_base_/fpn_40k_ade20k.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(name="fmvit_base", drop_path_rate=0.15),
    neck=dict(in_channels=[64, 128, 352, 608]),
)
