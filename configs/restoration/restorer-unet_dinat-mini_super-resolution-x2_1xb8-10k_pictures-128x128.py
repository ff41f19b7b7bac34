"""A U-shaped restorer on DiNAT-Mini, twice the size (MATLAB's bicubic): one process, batch 8, 10000 iterations."""

_base_ = ["../_base_/pictures.py", "../_base_/restoration_10k.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
degradation = dict(_delete_=True, type="Bicubic", scale=2)
train_dataloader = dict(dataset=dict(degradation=degradation))
val_dataloader = dict(dataset=dict(degradation=degradation))
test_dataloader = val_dataloader
model = dict(
    type="Restorer",
    backbone=dict(name="dinat_mini", drop_path_rate=0.0),
    neck=dict(type="RestorerUNet", channels=32, depth=1, upscale=2),
    loss=dict(type="CharbonnierLoss"),
)
