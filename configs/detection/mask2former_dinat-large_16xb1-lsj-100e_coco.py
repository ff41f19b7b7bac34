"""Mask2Former on DiNAT-Large, COCO instances, 16 processes of batch 1, 100 epochs: the authors' recipe."""

_base_ = ["mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py", "../_base_/dinat-large_mask2former.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(_delete_=True, **_base_.dinat_large),
    panoptic_head=dict(in_channels=_base_.dinat_large_channels, num_queries=200),
)
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True, custom_keys=_base_.dinat_large_keys, norm_decay_mult=0.0))
param_scheduler = dict(end=737500, milestones=[655556, 710184])
train_cfg = dict(max_iters=737500, dynamic_intervals=[(735001, 737500)])
