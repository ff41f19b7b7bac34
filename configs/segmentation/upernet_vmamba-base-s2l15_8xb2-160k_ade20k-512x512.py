"""UPerNet on VMamba-B (s2l15), ADE20K, 8 processes of batch 2, 160000 iterations: the authors' recipe (Swin's)."""

_base_ = "../_base_/upernet_160k_ade20k.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(name="vmamba_base_s2l15", drop_path_rate=0.6),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
