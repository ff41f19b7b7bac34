"""Mask R-CNN on VMamba-S (s2l15), COCO, 12 epochs: the authors' recipe (Swin's)."""

_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(
        _delete_=True, type="TerrazzoBackbone", pretrained=True, name="vmamba_small_s2l15", drop_path_rate=0.3
    ),
)
