"""DiNAT_s-Large on ImageNet-1k, 384x384, from ImageNet-22k at 224x224: 8 processes of batch 64, 30 epochs."""

_base_ = "../_base_/imagenet-384x384_30e.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
dilations = [[1, 13], [1, 6], [1, 3] * 9, [1] * 2]
model = dict(backbone=dict(name="dinat_s_large.in22k", dilations=dilations))
optim_wrapper = dict(optimizer=dict(weight_decay=1e-5))
