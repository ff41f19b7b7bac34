"""RetinaNet on SOFT++-Tiny, COCO, 12 epochs: mmdet's 1x with AdamW, as in the paper's tables.

The authors published results (box AP 40.0), but no code for detection; details are ours. Fetch their weights by hand
and set `model.backbone.checkpoint`.
"""

_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "../_base_/adamw_1x_coco.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(_delete_=True, type="TerrazzoBackbone", name="softpp_tiny", drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
optim_wrapper = dict(paramwise_cfg=dict(flat_decay_mult=0.0))
sync_bn = "torch"
