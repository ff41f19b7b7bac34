"""MCTF-DeiT-tiny in patches of 8 on EuroSAT, 64x64: one process, batch 64, 30 epochs, token-reduction consistency.

It starts from scratch, or with `model.backbone.checkpoint` from a DeiT that this config trained with
`model.backbone.r=0 model.recipe=None`. Each block but the first merges 5 of the 65 tokens, so that 10 are left.
"""

_base_ = ["../_base_/classification_runtime.py", "../_base_/eurosat64.py", "../_base_/adamw_30e.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    type="Classifier",
    backbone=dict(name="mctf_deit_tiny", patch_size=8, grid=(8, 8), r=5, num_classes=10, drop_path_rate=0.1),
    loss=dict(type="LabelSmoothingCrossEntropy", smoothing=0.1),
    recipe=dict(type="TokenConsistency", r_max=3),
)
