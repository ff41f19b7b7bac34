"""Cascade Mask R-CNN on MambaVision, COCO, 36 epochs: the authors' recipe, in mixed precision (`--amp fp16`).

Windows of 112 and 56 fit images of 1792 pixels: smaller maps are padded to the windows. The authors' configs have drop
paths of 0.3 and more, but their wrapper does not pass them on, so all models were trained with 0.2.
"""

_base_ = "cascade-mask-rcnn_3x_coco.py"
model = dict(backbone=dict(drop_path_rate=0.2, window_size=(112, 56)))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]
