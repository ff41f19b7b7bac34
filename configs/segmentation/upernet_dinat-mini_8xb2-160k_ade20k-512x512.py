"""UPerNet on DiNAT-Mini, ADE20K, 8 processes of batch 2, 160000 iterations: the authors' recipe."""

_base_ = "../_base_/upernet_160k_ade20k.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
dilations = [[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4], [1, 2, 1, 2, 1]]
model = dict(
    backbone=dict(name="dinat_mini", drop_path_rate=0.2, dilations=dilations),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
