"""DualToken-ViT-S (mix) on ImageNet-1k, 224x224: 8 processes of batch 128, 300 epochs; the recipe is NAT's.

The other variants are `model.backbone.name` dualtokenvit_small, _tiny and _tiny_mix.
"""

_base_ = "../_base_/imagenet_300e.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(backbone=dict(name="dualtokenvit_small_mix", drop_path_rate=0.1))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"stem.tokens": dict(decay_mult=0.0)}))
sync_bn = "torch"
