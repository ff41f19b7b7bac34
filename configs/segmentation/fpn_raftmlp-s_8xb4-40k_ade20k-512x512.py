"""Semantic FPN on RaftMLP-S, ADE20K, 8 processes of batch 4, 40000 iterations, as PoolFormer trains.

As in the authors' segmentors, the map of stride 4 is the embedding before the first block, and maps are not normalised.
No weights are public: train the ImageNet config first, and name its file as `model.backbone.checkpoint`.
"""

_base_ = "../_base_/fpn_40k_ade20k.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(name="raftmlp_s", stride4="embed", norm_outputs=False, drop_path_rate=0.0),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
