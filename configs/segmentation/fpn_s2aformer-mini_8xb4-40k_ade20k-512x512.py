"""Semantic FPN on S2AFormer-mini, ADE20K, 8 processes of batch 4, 40000 iterations: PoolFormer's recipe.

No weights are public: train the ImageNet config first, and name its file as `model.backbone.checkpoint`.
"""

_base_ = [
    "mmseg::_base_/models/fpn_r50.py",
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/schedules/schedule_40k.py",
    "mmseg::_base_/default_runtime.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(_delete_=True, type="TerrazzoBackbone", name="s2aformer_mini", drop_path_rate=0.0),
    neck=dict(in_channels=[32, 64, 96, 288]),
    decode_head=dict(num_classes=150),
)
optimizer = dict(_delete_=True, type="AdamW", lr=2e-4, weight_decay=1e-4)
optim_wrapper = dict(optimizer=optimizer)
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=40000)]
train_dataloader = dict(batch_size=4)
sync_bn = "torch"
