"""Linear InfViT of 4 layers and 192 channels in patches of 8 on EuroSAT, 64x64: one process, batch 64, 30 epochs.

The pure form is `model.backbone.kind=pure model.backbone.extra_proj=True`.
"""

_base_ = ["../_base_/classification_runtime.py", "../_base_/eurosat64.py", "../_base_/adamw_30e.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    type="Classifier",
    backbone=dict(
        name="infvit_linear_4l_patch16_224",
        img_size=64,
        patch_size=8,
        embed_dim=192,
        num_heads=3,
        num_classes=10,
        drop_path_rate=0.1,
    ),
    loss=dict(type="LabelSmoothingCrossEntropy", smoothing=0.1),
)
