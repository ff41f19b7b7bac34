"""DINOv2 ViT-S/14 to Hedgehog, third stage: the whole student like the teacher, all weights trained.

Set `load_from` to the file of the stage convert-hidden.
"""

_base_ = [
    "convert-matrix_vit-small-dinov2-hedgehog_1xb16-2k_unlabelled-224x224.py",
    "../_base_/conversion_distil.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
