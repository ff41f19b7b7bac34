"""RetinaNet on AttNet-XXS, COCO, 12 epochs: mmdet's 1x with AdamW.

The recipe is ours: the authors published no detector. Fetch their weights by hand and set `model.backbone.checkpoint`.
"""

_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "../_base_/adamw_1x_coco.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(_delete_=True, type="TerrazzoBackbone", name="attnet_xxs", drop_path_rate=0.0, out_indices=(1, 2, 3)),
    neck=dict(in_channels=[64, 128, 240], start_level=0),
)
optim_wrapper = dict(paramwise_cfg=dict(flat_decay_mult=0.0))
sync_bn = "torch"
