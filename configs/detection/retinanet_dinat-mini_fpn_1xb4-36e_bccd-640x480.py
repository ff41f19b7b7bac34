"""RetinaNet on DiNAT-Mini, blood cells (BCCD): one process, batch 4, 36 epochs."""

_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/default_runtime.py",
    "../_base_/bccd.py",
    "../_base_/adamw_36e.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(_delete_=True, type="TerrazzoBackbone", name="dinat_mini", drop_path_rate=0.2, out_indices=(1, 2, 3)),
    neck=dict(in_channels=[128, 256, 512], start_level=0),
    bbox_head=dict(num_classes=3),
)
default_hooks = dict(checkpoint=dict(interval=3, max_keep_ckpts=2, save_best="coco/bbox_mAP"))
