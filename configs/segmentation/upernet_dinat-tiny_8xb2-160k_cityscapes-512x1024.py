"""UPerNet on DiNAT-Tiny, Cityscapes, 8 processes of batch 2, 160000 iterations: as the authors train on ADE20K.

The authors have no UPerNet on Cityscapes; crops are 512 pixels high, so it has their dilations for 512 pixels.
"""

_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "mmseg::_base_/datasets/cityscapes.py",
    "../_base_/adamw_160k.py",
]
custom_imports = dict(imports=["terrazzo.openmmlab"])
dilations = [[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4] * 3, [1, 2, 1, 2, 1]]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        _delete_=True,
        type="TerrazzoBackbone",
        name="dinat_tiny",
        pretrained=True,
        drop_path_rate=0.3,
        dilations=dilations,
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
