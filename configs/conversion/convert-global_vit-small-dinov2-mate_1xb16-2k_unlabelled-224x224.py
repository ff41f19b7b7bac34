"""DINOv2 ViT-S/14 to MATE, first half of the second stage: the scan and the mix learn, windows stay as they are.

Set `load_from` to the file of the stage convert-matrix, or leave it out.
"""

_base_ = "convert-matrix_vit-small-dinov2-mate_1xb16-2k_unlabelled-224x224.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(stage=dict(type="hidden", branch="global"))
