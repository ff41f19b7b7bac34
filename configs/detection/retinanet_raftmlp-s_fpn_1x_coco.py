"""RetinaNet on RaftMLP-S, COCO, 12 epochs: mmdet's 1x with AdamW.

As in the authors' detectors, maps are not normalised. No weights are public: train the ImageNet config first, and name
its file as `model.backbone.checkpoint`.
"""

_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "../_base_/adamw_1x_coco.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(
        _delete_=True,
        type="TerrazzoBackbone",
        name="raftmlp_s",
        out_indices=(1, 2, 3),
        norm_outputs=False,
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=[128, 256, 512], start_level=0),
)
