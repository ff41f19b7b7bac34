"""M3ViT-tiny for classes and disparities of Cityscapes at 256 x 128: one process, batch 8, 100 epochs, from scratch.

The sizes are Edge-MoE's; M3ViT's authors have the same rates and the same loss of the routers.
"""

_base_ = [
    "mmseg::_base_/default_runtime.py",
    "../_base_/cityscapes_depth.py",
    "../_base_/m3vit_100e.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    type="MultiTask",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        size=_base_.crop_size,
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(type="TerrazzoBackbone", name="m3vit_tiny", out_indices=(11,), norm_outputs=False),
    tasks=dict(
        segmentation=dict(
            type="EncoderDecoder",
            decode_head=dict(
                type="M3ViTHead", in_channels=192, num_classes=19, loss_decode=dict(type="CrossEntropyLoss")
            ),
            test_cfg=dict(mode="whole"),
        ),
        depth=dict(
            type="DepthEstimator",
            decode_head=dict(type="M3ViTDepthHead", in_channels=192),
            test_cfg=dict(mode="whole"),
        ),
    ),
)
