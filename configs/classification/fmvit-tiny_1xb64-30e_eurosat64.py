"""FMViT-tiny on EuroSAT, 64x64: one process, batch 64, 30 epochs."""

_base_ = ["../_base_/classification_runtime.py", "../_base_/eurosat64.py", "../_base_/adamw_30e.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    type="Classifier",
    backbone=dict(name="fmvit_tiny", num_classes=10, drop_path_rate=0.0),
    loss=dict(type="LabelSmoothingCrossEntropy", smoothing=0.1),
)
