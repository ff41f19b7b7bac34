"""Mask R-CNN on COCO for 36 epochs; a config adds the backbone's name, rates and dilations, and the neck's channels."""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "coco_ms-crop-3x.py"]
model = dict(backbone=dict(_delete_=True, type="TerrazzoBackbone", pretrained=True))
