"""SegFormer's all-MLP head on DiNAT-Mini, CamVid: one process, batch 4, 10000 iterations."""

_base_ = [
    "mmseg::_base_/models/segformer_mit-b0.py",
    "mmseg::_base_/default_runtime.py",
    "../_base_/camvid.py",
    "../_base_/adamw_10k.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(_delete_=True, type="TerrazzoBackbone", name="dinat_mini", drop_path_rate=0.2),
    decode_head=dict(in_channels=[64, 128, 256, 512], num_classes=11, norm_cfg=dict(type="BN")),
)
