"""UPerNet on MambaVision-S, ADE20K, 8 processes of batch 2, 160000 iterations: the authors' recipe."""

_base_ = "../_base_/mambavision_upernet_160k_ade20k.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(name="mambavision_s", window_size=(160, 56)),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5))
