"""DINOv2 ViT-S/14 to Hedgehog, third stage: the whole student like the teacher, all weights trained.

Rates fall by 0.9 per layer. A moving average of the weights is validated and saved.
Set `load_from` to the file of the stage convert-hidden.
"""

_base_ = "convert-matrix_vit-small-dinov2-hedgehog_1xb16-2k_unlabelled-224x224.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(stage=dict(type="distil"))
optim_wrapper = dict(
    constructor="LayerDecayOptimWrapperConstructor",
    optimizer=dict(lr=2e-4),
    paramwise_cfg=dict(layer_decay=0.9),
)
custom_hooks = [dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.01)]
