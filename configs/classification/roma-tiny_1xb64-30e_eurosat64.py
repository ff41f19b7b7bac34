"""RoMA-tiny in patches of 8 on EuroSAT, 64x64: one process, batch 64, 30 epochs.

It starts from scratch, or with `model.backbone.checkpoint` from a file of `roma-tiny_1xb64-100e_eurosat64`.
"""

_base_ = ["../_base_/classification_runtime.py", "../_base_/eurosat64.py", "../_base_/adamw_30e.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    type="Classifier",
    backbone=dict(name="roma_tiny", img_size=64, patch_size=8, num_classes=10, drop_path_rate=0.1),
    loss=dict(type="LabelSmoothingCrossEntropy", smoothing=0.1),
)
