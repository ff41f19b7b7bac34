"""AS-ViT-DeiT-small on ImageNet-1k, 224x224, a budget of 65 %: 4 processes of batch 128, 30 epochs, as the authors."""

_base_ = "../_base_/asvit_imagenet_30e.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(backbone=dict(name="asvit_deit_small", pretrained=True))
