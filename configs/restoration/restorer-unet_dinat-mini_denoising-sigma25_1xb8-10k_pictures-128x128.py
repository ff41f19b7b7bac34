"""A U-shaped restorer on DiNAT-Mini against Gaussian noise of sigma 25: one process, batch 8, 10000 iterations."""

_base_ = "../_base_/restorer-unet_dinat-mini.py"
degradation = dict(_delete_=True, type="GaussianNoise", sigma=25)
train_dataloader = dict(dataset=dict(degradation=degradation))
val_dataloader = dict(dataset=dict(degradation=degradation))
test_dataloader = val_dataloader
