"""MambaVision-T on ImageNet-1k, 224x224: 32 processes of batch 128, 300 epochs, the authors' recipe without MESA."""

_base_ = "../_base_/mambavision_imagenet_300e.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(backbone=dict(name="mambavision_t", drop_path_rate=0.2))
