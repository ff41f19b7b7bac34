"""RTMDet on S2AFormer-mini, COCO, 300 epochs: the recipe of mmdet's RTMDet-tiny.

No weights are public: train the ImageNet config first, and name its file as `model.backbone.checkpoint`.
"""

_base_ = "mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    # The pictures' mean and deviation are the same as in ImageNet training, in RGB.
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        _delete_=True, type="TerrazzoBackbone", name="s2aformer_mini", drop_path_rate=0.0, out_indices=(1, 2, 3)
    ),
    neck=dict(in_channels=[64, 96, 288]),
)
sync_bn = "torch"
