"""DiNAT-Mini on photos of clothes, 96x96, with mixup and CutMix: one process, batch 64, 30 epochs."""

_base_ = ["../_base_/classification_runtime.py", "../_base_/clothing96.py", "../_base_/adamw_30e.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    type="Classifier",
    backbone=dict(name="dinat_mini", num_classes=10, drop_path_rate=0.1),
    loss=dict(type="SoftTargetCrossEntropy"),
    mixup=dict(mixup_alpha=0.2, cutmix_alpha=1.0, prob=0.5, label_smoothing=0.1),
)
default_hooks = dict(checkpoint=dict(save_best="accuracy/mean_class"))
