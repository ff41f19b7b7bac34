"""AttNet-T2 on ImageNet-1k, 224x224: 32 processes of batch 128, 300 epochs, the authors' recipe."""

_base_ = "../_base_/attnet_imagenet_300e.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(backbone=dict(name="attnet_t2", drop_path_rate=0.2))
