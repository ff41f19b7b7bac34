"""Axial-VS across clips (offline) on ResNet-50, YouTube-VIS 2021, after near-online training: the authors' recipe."""

_base_ = ["../_base_/axialvs-offline_youtubevis2021.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
load_from = "work_dirs/mask2former-axialvs_r50_8xb1-15k_youtubevis2021/iter_15000.pth"
