"""SOFT++-Tiny on ImageNet-1k, 224x224: 8 processes of batch 128, 300 epochs, the authors' recipe."""

_base_ = "../_base_/soft_imagenet_300e.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(backbone=dict(name="softpp_tiny"))
