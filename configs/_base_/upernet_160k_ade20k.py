"""UPerNet on ADE20K at 512x512; a config adds the backbone's name, rates and dilations, and the heads' channels."""

_base_ = ["mmseg::_base_/models/upernet_swin.py", "mmseg::_base_/datasets/ade20k.py", "adamw_160k.py"]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(_delete_=True, type="TerrazzoBackbone", pretrained=True),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
train_dataloader = dict(batch_size=2)
