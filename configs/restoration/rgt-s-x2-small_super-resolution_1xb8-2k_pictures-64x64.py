"""A small RGT-S (6 blocks of 60 channels, 0.5 M parameters), twice the size: one process, batch 8, 2000 iterations."""

_base_ = ["../_base_/pictures.py", "../_base_/restoration_10k.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
degradation = dict(_delete_=True, type="Bicubic", scale=2)
train_dataloader = dict(dataset=dict(degradation=degradation, crop=64))
val_dataloader = dict(dataset=dict(degradation=degradation))
test_dataloader = val_dataloader
model = dict(
    type="Restorer",
    backbone=dict(name="rgt_s_x2", depth=(2, 2, 2), embed_dim=60, split_size=(8, 16), drop_path_rate=0.0),
    loss=dict(type="L1Loss"),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-2, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=False, begin=50, end=2000),
]
train_cfg = dict(max_iters=2000, val_interval=250)
default_hooks = dict(checkpoint=dict(interval=250))
