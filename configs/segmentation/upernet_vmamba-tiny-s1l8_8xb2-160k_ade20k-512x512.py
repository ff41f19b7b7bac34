"""UPerNet on VMamba-T (s1l8), ADE20K, 8 processes of batch 2, 160000 iterations: the authors' recipe (Swin's)."""

_base_ = "../_base_/upernet_160k_ade20k.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(name="vmamba_tiny_s1l8", drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
