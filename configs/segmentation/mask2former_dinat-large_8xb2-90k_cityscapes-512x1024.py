"""Mask2Former on DiNAT-Large, Cityscapes, 8 processes of batch 2, 90000 iterations: the authors' recipe."""

_base_ = [
    "mmseg::mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py",
    "../_base_/dinat-large_mask2former.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(_delete_=True, **_base_.dinat_large),
    decode_head=dict(in_channels=_base_.dinat_large_channels),
)
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True, custom_keys=_base_.dinat_large_keys, norm_decay_mult=0.0))
