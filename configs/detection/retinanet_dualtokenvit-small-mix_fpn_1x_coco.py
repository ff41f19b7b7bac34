"""RetinaNet on DualToken-ViT-S (mix), COCO, 12 epochs: mmdet's 1x with AdamW.

No weights are public: train the ImageNet config first, and name its file as `model.backbone.checkpoint`.
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
        name="dualtokenvit_small_mix",
        drop_path_rate=0.1,
        out_indices=(0, 1, 2),
    ),
    neck=dict(in_channels=[64, 128, 256], start_level=0),
)
sync_bn = "torch"
