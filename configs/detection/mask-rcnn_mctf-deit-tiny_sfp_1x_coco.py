"""Mask R-CNN on MCTF-DeiT-tiny with ViTDet's simple feature pyramid, COCO, 12 epochs: mmdet's 1x with AdamW.

As in ViTDet, four blocks attend to the whole image and the others within windows. Tokens are merged within windows, and
the last block sees every position again.
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
        pretrained=True,
        name="mctf_deit_tiny_fast",
        drop_path_rate=0.1,
        out_indices=(11,),
        window=14,
        criteria=(1, 0, 40),
        cells_first=True,
        multiple=8,
    ),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=[192]),
)
