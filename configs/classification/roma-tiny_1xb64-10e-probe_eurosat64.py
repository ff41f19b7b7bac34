"""A linear probe of RoMA-tiny in patches of 8 on EuroSAT, 64x64: only the last layer, on the mean of the patches.

It probes a file of `roma-tiny_1xb64-100e_eurosat64`, given as `model.backbone.checkpoint`; without a file it probes
random weights, for comparison. The authors' probe reads the class token, which pretraining does not have.
"""

_base_ = ["../_base_/classification_runtime.py", "../_base_/eurosat64.py", "../_base_/adamw_30e.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    type="Classifier",
    backbone=dict(name="roma_tiny", img_size=64, patch_size=8, num_classes=10, global_pool="avg"),
    loss=dict(type="CrossEntropyLoss"),
    probe=True,
)
train_dataloader = dict(dataset=dict(transform=dict(scale=(0.9, 1.0), color_jitter=None)))
optim_wrapper = dict(optimizer=dict(lr=5e-3, weight_decay=0.0))
param_scheduler = [
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=True, begin=0, end=10, convert_to_iter_based=True)
]
train_cfg = dict(max_epochs=10)
