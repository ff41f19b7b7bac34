"""UPerNet on AttNet-T2, ADE20K, 8 processes of batch 2, 160000 iterations: the recipe of NAT, DiNAT and Swin.

The recipe is ours: the authors published no segmentor. Fetch their weights by hand and set `model.backbone.checkpoint`.
"""

_base_ = "../_base_/upernet_160k_ade20k.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(name="attnet_t2", pretrained=False, drop_path_rate=0.2),
    decode_head=dict(in_channels=[64, 128, 288, 512]),
    auxiliary_head=dict(in_channels=288),
)
optim_wrapper = dict(paramwise_cfg=dict(flat_decay_mult=0.0))
sync_bn = "torch"
