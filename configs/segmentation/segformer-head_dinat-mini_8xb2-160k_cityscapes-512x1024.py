"""SegFormer's all-MLP head on DiNAT-Mini, Cityscapes, 8 processes of batch 2, 160000 iterations.

The config is ours: it has the authors' rates and dilations for 512 pixels, and ten times the rate in the head, as
SegFormer.
"""

_base_ = [
    "mmseg::_base_/models/segformer_mit-b0.py",
    "mmseg::_base_/datasets/cityscapes.py",
    "../_base_/adamw_160k.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
dilations = [[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4], [1, 2, 1, 2, 1]]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        _delete_=True,
        type="TerrazzoBackbone",
        name="dinat_mini",
        pretrained=True,
        drop_path_rate=0.2,
        dilations=dilations,
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(decode_head=dict(lr_mult=10.0))))
