"""UPerNet on MambaVision-T, ADE20K, 8 processes of batch 2, 160000 iterations: the authors' recipe."""

_base_ = "../_base_/mambavision_upernet_160k_ade20k.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(name="mambavision_t"),
    decode_head=dict(in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(in_channels=320),
)
