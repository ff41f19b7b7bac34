"""Axial-VS within clips (near-online) on DiNAT-Mini, YouTube-VIS 2021: the authors' recipe with another backbone."""

_base_ = ["../_base_/axialvs_youtubevis2021.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    init_cfg=None,
    backbone=dict(_delete_=True, type="TerrazzoBackbone", name="dinat_mini", pretrained=True, drop_path_rate=0.2),
    track_head=dict(in_channels=[64, 128, 256, 512]),
)
