"""Semantic FPN on DualToken-ViT-S (mix), ADE20K, 8 processes of batch 4, 40000 iterations: PoolFormer's recipe.

No weights are public: train the ImageNet config first, and name its file as `model.backbone.checkpoint`.
"""

_base_ = "../_base_/fpn_40k_ade20k.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(name="dualtokenvit_small_mix", drop_path_rate=0.1, out_indices=(0, 1, 2)),
    neck=dict(in_channels=[64, 128, 256], num_outs=3),
    decode_head=dict(in_channels=[256, 256, 256], in_index=[0, 1, 2], feature_strides=[8, 16, 32]),
)
