"""MambaVision-T on EuroSAT, 64x64: one process, batch 64, 30 epochs."""

_base_ = ["../_base_/classification_runtime.py", "../_base_/eurosat64.py", "../_base_/adamw_30e.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    type="Classifier",
    backbone=dict(name="mambavision_t", num_classes=10, drop_path_rate=0.1, window_size=(4, 2)),
    loss=dict(type="LabelSmoothingCrossEntropy", smoothing=0.1),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(A_log=dict(decay_mult=0.0))))
