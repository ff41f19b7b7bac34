"""Semantic FPN on ADE20K, 8 processes of batch 4, 40000 iterations: PoolFormer's recipe."""

_base_ = [
    "mmseg::_base_/models/fpn_r50.py",
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/schedules/schedule_40k.py",
    "mmseg::_base_/default_runtime.py",
]
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(_delete_=True, type="TerrazzoBackbone"),
    decode_head=dict(num_classes=150),
)
optimizer = dict(_delete_=True, type="AdamW", lr=2e-4, weight_decay=1e-4)
optim_wrapper = dict(optimizer=optimizer)
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=40000)]
train_dataloader = dict(batch_size=4)
sync_bn = "torch"
