"""RGT-S, twice the size, by the paper's schedule (arXiv 2303.06373, section 4.1): four processes, batch 8 each."""

_base_ = ["../_base_/pictures.py", "../_base_/restoration_10k.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
degradation = dict(_delete_=True, type="Bicubic", scale=2)
train_dataloader = dict(dataset=dict(degradation=degradation))
val_dataloader = dict(dataset=dict(degradation=degradation))
test_dataloader = val_dataloader
model = dict(type="Restorer", backbone=dict(name="rgt_s_x2"), loss=dict(type="L1Loss"))
optim_wrapper = dict(_delete_=True, type="OptimWrapper", optimizer=dict(type="Adam", lr=2e-4, betas=(0.9, 0.99)))
param_scheduler = [
    dict(type="MultiStepLR", by_epoch=False, milestones=[250000, 400000, 450000, 475000], gamma=0.5),
]
train_cfg = dict(max_iters=500000, val_interval=5000)
default_hooks = dict(checkpoint=dict(interval=5000))
