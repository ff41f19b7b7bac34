"""DiNAT-Large on ImageNet-1k, 384x384, from ImageNet-22k at 224x224: 8 processes of batch 64, 30 epochs."""

_base_ = "../_base_/imagenet-384x384_30e.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
dilations = [[1, 13, 1], [1, 6] * 2, [1, 3] * 9, [1] * 5]
model = dict(backbone=dict(name="dinat_large.in22k", dilations=dilations))
