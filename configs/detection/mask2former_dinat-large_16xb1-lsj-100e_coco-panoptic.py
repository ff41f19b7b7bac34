"""Mask2Former on DiNAT-Large, COCO panoptic, 16 processes of batch 1, 100 epochs: the authors' recipe.

Published: PQ 58.5. `terrazzo.openmmlab` provides the part of panopticapi, which is not on PyPI, that mmdet needs.
"""

_base_ = [
    "mmdet::mask2former/mask2former_swin-l-p4-w12-384-in21k_16xb1-lsj-100e_coco-panoptic.py",
    "../_base_/dinat-large_mask2former.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(_delete_=True, **_base_.dinat_large),
    panoptic_head=dict(in_channels=_base_.dinat_large_channels),
)
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True, custom_keys=_base_.dinat_large_keys, norm_decay_mult=0.0))
