"""DINOv2 ViT-S/14 to Hedgehog, first stage: matrices like softmax attention's, at 257 tokens.

Then: convert-hidden and convert-distil of the same name, each with `load_from` set to the file of the stage before.
"""

_base_ = "../_base_/conversion_2k.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    type="AttentionConversion",
    teacher=dict(name="vit_small_patch14_dinov2", pretrained=True, dynamic_img_size=True),
    convert=dict(mixer="hedgehog", layers="all"),
    stage=dict(type="matrix"),
)
