"""DINOv2 ViT-S/14 to Hedgehog, second stage: outputs of attention layers like the teacher's.

Set `load_from` to the file of the stage convert-matrix; without it, the stage starts from the teacher's attention.
"""

_base_ = "convert-matrix_vit-small-dinov2-hedgehog_1xb16-2k_unlabelled-224x224.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(stage=dict(type="hidden"))
