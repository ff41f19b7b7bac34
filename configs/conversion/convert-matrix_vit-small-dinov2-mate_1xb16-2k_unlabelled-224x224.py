"""DINOv2 ViT-S/14 to MATE, first stage: matrices like softmax attention's, at 257 tokens.

Then: convert-global, convert-hidden and convert-distil of the same name, each with `load_from` set to the file of the
stage before. The scan's sums have no normaliser, so its queries start small, and its convolutions learn slowly.
"""

_base_ = "../_base_/conversion_2k.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    type="AttentionConversion",
    teacher=dict(name="vit_small_patch14_dinov2", pretrained=True, dynamic_img_size=True),
    convert=dict(mixer="mate", layers="all", window=8, scale=1 / 1024, review=False),
    stage=dict(type="matrix"),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={".conv.": dict(lr_mult=0.1)}))
