"""ViT-tiny on EuroSAT to Hedgehog, third stage: the whole student like the teacher, 60 iterations of 64 images.

Set `load_from` to the file of convert-hidden_vit-tiny-hedgehog_1xb64-90_eurosat64. Rates fall by 0.9 per layer.
"""

_base_ = "convert-matrix_vit-tiny-hedgehog_1xb64-30_eurosat64.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(stage=dict(type="distil"))
optim_wrapper = dict(
    constructor="LayerDecayOptimWrapperConstructor", optimizer=dict(lr=3e-4), paramwise_cfg=dict(layer_decay=0.9)
)
param_scheduler = dict(end=60)
train_cfg = dict(max_iters=60)
