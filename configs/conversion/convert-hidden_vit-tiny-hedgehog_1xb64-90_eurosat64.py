"""ViT-tiny on EuroSAT to Hedgehog, second stage: outputs of attention like the teacher's, 90 iterations of 64 images.

Set `load_from` to the file of convert-matrix_vit-tiny-hedgehog_1xb64-30_eurosat64.
"""

_base_ = "convert-matrix_vit-tiny-hedgehog_1xb64-30_eurosat64.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(stage=dict(type="hidden"))
param_scheduler = dict(end=90)
train_cfg = dict(max_iters=90)
