"""RaftMLP-S made for 64x64 images on EuroSAT: one process, batch 64, 30 epochs."""

_base_ = ["../_base_/classification_runtime.py", "../_base_/eurosat64.py", "../_base_/adamw_30e.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    type="Classifier",
    backbone=dict(name="raftmlp_s", img_size=64, num_classes=10, drop_path_rate=0.1),
    loss=dict(type="LabelSmoothingCrossEntropy", smoothing=0.1),
)
