"""MCTF-DeiT-tiny on ImageNet-1k, 224x224, 16 tokens a block: 8 processes of batch 128, 30 epochs, as the authors."""

_base_ = "../_base_/mctf_imagenet_30e.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(backbone=dict(name="mctf_deit_tiny"))
