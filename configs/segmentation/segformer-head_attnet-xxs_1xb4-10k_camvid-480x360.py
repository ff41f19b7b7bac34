"""SegFormer's all-MLP head on AttNet-XXS, CamVid: one process, batch 4, 10000 iterations."""

_base_ = [
    "mmseg::_base_/models/segformer_mit-b0.py",
    "mmseg::_base_/default_runtime.py",
    "../_base_/camvid.py",
    "../_base_/adamw_10k.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(_delete_=True, type="TerrazzoBackbone", name="attnet_xxs", drop_path_rate=0.0),
    decode_head=dict(in_channels=[32, 64, 128, 240], num_classes=11, norm_cfg=dict(type="BN")),
)
optim_wrapper = dict(paramwise_cfg=dict(flat_decay_mult=0.0))
