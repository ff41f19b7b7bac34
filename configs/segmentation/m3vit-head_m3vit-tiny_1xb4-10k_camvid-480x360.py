"""M3ViT-tiny as a segmentor alone, with its authors' decoder, CamVid: one process, batch 4, 10000 iterations."""

_base_ = [
    "mmseg::_base_/models/fpn_r50.py",
    "mmseg::_base_/default_runtime.py",
    "../_base_/camvid.py",
    "../_base_/adamw_10k.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        _delete_=True,
        type="TerrazzoBackbone",
        name="m3vit_tiny",
        tasks=["segmentation"],
        img_size=_base_.crop_size,
        out_indices=(11,),
        norm_outputs=False,
    ),
    neck=None,
    decode_head=dict(
        _delete_=True,
        type="M3ViTHead",
        in_channels=[192],
        num_classes=11,
        loss_decode=dict(type="CrossEntropyLoss"),
    ),
)
