"""Semantic FPN on DINOv2's ViT-S/14 with Hedgehog in place of attention, CamVid: batch 4, 10000 iterations.

The model pads pictures to whole patches of 14 pixels. The maps have strides 3.5, 7, 14 and 28.
"""

_base_ = ["fpn_vit-tiny-converted_1xb4-10k_camvid-480x360.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(backbone=dict(name="vit_small_patch14_dinov2"), neck=dict(in_channels=[384]))
