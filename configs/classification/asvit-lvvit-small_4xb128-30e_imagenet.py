"""AS-ViT-LV-ViT-small on ImageNet-1k, 224x224, a budget of 70 %: 4 processes of batch 128, 30 epochs, as the authors.

LV-ViT's weights must be fetched by hand: `model.backbone.checkpoint=lvvit_s-224-83.3.pth.tar`, from
github.com/zihangJiang/TokenLabeling. For `model.backbone.name=asvit_lvvit_medium` it is lvvit_m-56M-224-84.0.tar.
"""

_base_ = "../_base_/asvit_imagenet_30e.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(backbone=dict(name="asvit_lvvit_small"), recipe=dict(budget=0.7))
