"""AS-ViT-DeiT-tiny in patches of 8 on EuroSAT, 64x64: one process, batch 64, 30 epochs, a budget of 65 % of the cost.

It starts from a DeiT, which is also the teacher: `model.backbone.checkpoint` is a file that
`mctf-deit-tiny_1xb64-30e_eurosat64` trained with `model.backbone.r=0 model.recipe=None`. Costs are small at 64 pixels,
so the budget has a larger weight than at 224.
"""

_base_ = ["../_base_/classification_runtime.py", "../_base_/eurosat64.py", "../_base_/adamw_30e.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    type="Classifier",
    backbone=dict(name="asvit_deit_tiny", patch_size=8, grid=(8, 8), num_classes=10),
    loss=dict(type="LabelSmoothingCrossEntropy", smoothing=0.1),
    recipe=dict(type="TokenBudget", budget=0.65, weight=7.0),
)
optim_wrapper = dict(
    optimizer=dict(lr=1e-4), paramwise_cfg=dict(custom_keys=dict(thresholds=dict(decay_mult=0.0))), clip_grad=None
)
