"""ViR-small in patches of 8 on EuroSAT, 64x64: one process, batch 64, 30 epochs."""

_base_ = ["../_base_/classification_runtime.py", "../_base_/eurosat64.py", "../_base_/adamw_30e.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    type="Classifier",
    backbone=dict(name="vir_small_patch16_224", img_size=64, patch_size=8, num_classes=10, drop_path_rate=0.1),
    loss=dict(type="LabelSmoothingCrossEntropy", smoothing=0.1),
)
