"""The base model of a zoom, semantic FPN on AttNet-XXS, CamVid: trained at scales from 1/4 to 1, 10000 iterations.

One model serves the coarse and the fine pass. The pictures of a batch are padded to the largest, with ignored pixels.
"""

_base_ = [
    "../_base_/zoom_fpn_attnet-xxs.py",
    "mmseg::_base_/default_runtime.py",
    "../_base_/camvid.py",
    "../_base_/adamw_10k.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(480, 360), ratio_range=(0.25, 1.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=_base_.crop_size),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
