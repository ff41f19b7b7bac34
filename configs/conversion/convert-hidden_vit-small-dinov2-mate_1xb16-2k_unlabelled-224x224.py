"""DINOv2 ViT-S/14 to MATE, second half of the second stage: both branches and the projections learn.

Set `load_from` to the file of the stage convert-global.
"""

_base_ = "convert-matrix_vit-small-dinov2-mate_1xb16-2k_unlabelled-224x224.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(stage=dict(type="hidden"))
optim_wrapper = dict(optimizer=dict(lr=5e-4))
