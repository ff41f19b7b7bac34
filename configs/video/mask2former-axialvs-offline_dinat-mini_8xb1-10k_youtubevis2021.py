"""Axial-VS across clips (offline) on DiNAT-Mini, YouTube-VIS 2021, after the near-online training."""

_base_ = ["../_base_/axialvs-offline_youtubevis2021.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(_delete_=True, type="TerrazzoBackbone", name="dinat_mini"),
    track_head=dict(in_channels=[64, 128, 256, 512]),
)
load_from = "work_dirs/mask2former-axialvs_dinat-mini_8xb1-15k_youtubevis2021/iter_15000.pth"
