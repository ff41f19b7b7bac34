"""FMViT-tiny on ImageNet-1k, 224x224: 8 processes of batch 128, 300 epochs, as the paper; the recipe is NAT's.

The other variants are `model.backbone.name` fmvit_small, _medium, _base and _large, at drop paths 0.05, 0.1, 0.15, 0.2.
"""

_base_ = "../_base_/imagenet_300e.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(backbone=dict(name="fmvit_tiny", drop_path_rate=0.0))
sync_bn = "torch"
