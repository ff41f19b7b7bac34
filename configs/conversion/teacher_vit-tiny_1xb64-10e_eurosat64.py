"""ViT-tiny in patches of 8 on EuroSAT, 64x64, from scratch: the teacher of the conversions of this data set."""

_base_ = ["../_base_/classification_runtime.py", "../_base_/eurosat64.py", "../_base_/adamw_30e.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(type="Classifier", backbone=dict(name="vit_tiny_patch16_224", img_size=64, patch_size=8, num_classes=10))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=2, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=True, begin=2, end=10, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=10)
