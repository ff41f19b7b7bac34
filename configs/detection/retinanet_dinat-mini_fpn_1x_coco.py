"""RetinaNet on DiNAT-Mini, COCO, 12 epochs: mmdet's 1x with the authors' optimizer and dilations of 800 pixels."""

_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "../_base_/adamw_1x_coco.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
dilations = [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]]
model = dict(
    backbone=dict(
        _delete_=True,
        type="TerrazzoBackbone",
        pretrained=True,
        name="dinat_mini",
        drop_path_rate=0.2,
        out_indices=(1, 2, 3),
        dilations=dilations,
    ),
    neck=dict(in_channels=[128, 256, 512], start_level=0),
)
