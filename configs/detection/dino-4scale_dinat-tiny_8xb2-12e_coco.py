"""DINO with 4 scales on DiNAT-Tiny, COCO, 12 epochs: mmdet's recipe for ResNet-50, with dilations of 800 pixels."""

_base_ = "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
dilations = [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3, 1, 3, 1]]
model = dict(
    backbone=dict(
        _delete_=True,
        type="TerrazzoBackbone",
        name="dinat_tiny",
        pretrained=True,
        out_indices=(1, 2, 3),
        drop_path_rate=0.2,
        dilations=dilations,
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
