"""MedMamba-T on ImageNet-1k, 224x224: one process, batch 32, 100 epochs, the authors' recipe for medical data.

The other variants are `model.backbone.name` medmamba_s, medmamba_b, and medmamba_s_paper, medmamba_b_paper.
"""

_base_ = "../_base_/medmamba_imagenet_100e.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(backbone=dict(name="medmamba_t", drop_path_rate=0.1))
