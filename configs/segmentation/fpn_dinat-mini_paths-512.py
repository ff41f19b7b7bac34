"""A small FPN head on DiNAT-Mini, made-up paths of 512 pixels: batch 4, 10 000 iterations."""

_base_ = "fpn_dinat-mini_paths-128.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
data_root = "data/paths-512"
model = dict(data_preprocessor=dict(size=(512, 512)))
train_dataloader = dict(batch_size=4, dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
