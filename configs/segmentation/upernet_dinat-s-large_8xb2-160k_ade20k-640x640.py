"""UPerNet on DiNAT_s-Large, ADE20K at 640x640, from ImageNet-22k: the authors' recipe, without mixed precision."""

_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "mmseg::_base_/datasets/ade20k_640x640.py",
    "../_base_/adamw_160k.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
dilations = [[1, 20], [1, 10], [1, 2, 1, 3, 1, 4, 1, 5] * 2 + [1, 5], [1, 2]]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        _delete_=True,
        type="TerrazzoBackbone",
        name="dinat_s_large.in22k",
        pretrained=True,
        drop_path_rate=0.3,
        dilations=dilations,
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536], num_classes=150),
    auxiliary_head=dict(in_channels=768, num_classes=150),
)
train_dataloader = dict(batch_size=2)
