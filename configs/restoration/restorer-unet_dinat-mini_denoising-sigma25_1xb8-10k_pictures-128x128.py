"""A U-shaped restorer on DiNAT-Mini against Gaussian noise of sigma 25: one process, batch 8, 10000 iterations."""

_base_ = ["../_base_/pictures.py", "../_base_/restoration_10k.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
degradation = dict(_delete_=True, type="GaussianNoise", sigma=25)
train_dataloader = dict(dataset=dict(degradation=degradation))
val_dataloader = dict(dataset=dict(degradation=degradation))
test_dataloader = val_dataloader
model = dict(
    type="Restorer",
    backbone=dict(name="dinat_mini", drop_path_rate=0.0),
    neck=dict(type="RestorerUNet", channels=32, depth=1, upscale=1),
    loss=dict(type="CharbonnierLoss"),
)
