"""Mask2Former on DiNAT-Large, ADE20K, 8 processes of batch 2, 160000 iterations: the authors' recipe."""

_base_ = [
    "mmseg::mask2former/mask2former_swin-l-in22k-384x384-pre_8xb2-160k_ade20k-640x640.py",
    "../_base_/dinat-large_mask2former.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(_delete_=True, **_base_.dinat_large),
    decode_head=dict(in_channels=_base_.dinat_large_channels),
)
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True, custom_keys=_base_.dinat_large_keys, norm_decay_mult=0.0))
