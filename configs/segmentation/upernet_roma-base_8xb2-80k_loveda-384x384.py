"""UPerNet on RoMA-base, LoveDA, crops of 384: RoMA's recipe for SpaceNet v1, which mmsegmentation does not know.

Layer decay 0.9, tests in windows of 384 every 256 pixels. The number of iterations is ours. Fetch the authors'
pretrained weights by hand and set `model.backbone.checkpoint`.
"""

_base_ = ["mmseg::_base_/models/upernet_swin.py", "mmseg::_base_/datasets/loveda.py", "../_base_/adamw_160k.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
crop_size = (384, 384)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        _delete_=True,
        type="TerrazzoBackbone",
        name="roma_base",
        img_size=384,
        out_indices=(11,),
        drop_path_rate=0.1,
    ),
    neck=dict(type="PlainPyramid", in_channels=[768]),
    decode_head=dict(in_channels=[768] * 4, num_classes=7),
    auxiliary_head=dict(in_channels=768, num_classes=7),
    test_cfg=dict(mode="slide", crop_size=crop_size, stride=(256, 256)),
)
train_pipeline = [*_base_.train_pipeline]
train_pipeline[3] = dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75)
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.05),
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(_delete_=True, layer_decay=0.9),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=1500, end=80000),
]
train_cfg = dict(max_iters=80000, val_interval=8000)
