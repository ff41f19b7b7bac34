"""Mask R-CNN on linear InfViT with ViTDet's simple feature pyramid, COCO, 12 epochs: mmdet's 1x with AdamW.

The recipe is ours: the paper has no detector. No weights are public: train the ImageNet config first, and name its file
as `model.backbone.checkpoint`.
"""

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/adamw_1x_coco.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(
        _delete_=True,
        type="TerrazzoBackbone",
        name="infvit_linear_4l_patch16_224",
        drop_path_rate=0.1,
        out_indices=(3,),
    ),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=[1024]),
)
