"""Cascade Mask R-CNN on COCO for 36 epochs; box heads with four convolutions, batch norm and the GIoU loss.

A config adds the backbone's name, rates and dilations, and the neck's channels. From the authors' detection/configs.
"""

_base_ = ["mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py", "coco_ms-crop-3x.py"]
model = dict(
    backbone=dict(_delete_=True, type="TerrazzoBackbone", pretrained=True),
    roi_head=dict(
        bbox_head=[
            dict(
                type="ConvFCBBoxHead",
                num_shared_convs=4,
                num_shared_fcs=1,
                in_channels=256,
                conv_out_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=deviations),
                reg_class_agnostic=False,
                reg_decoded_bbox=True,
                norm_cfg=dict(type="SyncBN", requires_grad=True),
                loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
            )
            for deviations in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
        ]
    ),
)
