"""Semantic FPN on S2AFormer-mini, ADE20K, 8 processes of batch 4, 40000 iterations: PoolFormer's recipe.

No weights are public: train the ImageNet config first, and name its file as `model.backbone.checkpoint`.
"""

_base_ = "../_base_/fpn_40k_ade20k.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(name="s2aformer_mini", drop_path_rate=0.0),
    neck=dict(in_channels=[32, 64, 96, 288]),
)
