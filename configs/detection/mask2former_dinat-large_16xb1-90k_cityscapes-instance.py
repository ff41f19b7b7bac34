"""Mask2Former on DiNAT-Large, Cityscapes instances, 16 processes of batch 1: the authors' recipe."""

_base_ = ["../_base_/mask2former_90k_cityscapes-instance.py", "../_base_/dinat-large_mask2former.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(_delete_=True, **_base_.dinat_large),
    panoptic_head=dict(in_channels=_base_.dinat_large_channels, num_queries=200),
)
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True, custom_keys=_base_.dinat_large_keys, norm_decay_mult=0.0))
