"""Linear InfViT of 4 layers on ImageNet-1k, 224x224: 8 processes of batch 128, 300 epochs.

The authors publish no training code: the recipe is NAT's. The other variants are `model.backbone.name`
infvit_pure_4l_patch16_224 and infvit_pure_24l_patch16_224.
"""

_base_ = "../_base_/imagenet_300e.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(backbone=dict(name="infvit_linear_4l_patch16_224", drop_path_rate=0.1))
