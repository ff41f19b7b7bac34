"""UPerNet on SOFT++-Small, ADE20K, 8 processes of batch 2, 160000 iterations: the recipe of Swin.

The authors published a result (mIoU 46.2), but no code for segmentation; details are ours. Fetch their weights by hand
and set `model.backbone.checkpoint`; a file with 20 blocks in stage 3 needs `depths=(1, 3, 20, 4)` in the backbone.
"""

_base_ = "../_base_/upernet_160k_ade20k.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(name="softpp_small", pretrained=False, drop_path_rate=0.1),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
optim_wrapper = dict(paramwise_cfg=dict(flat_decay_mult=0.0))
sync_bn = "torch"
