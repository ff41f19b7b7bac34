"""Axial-VS within clips (near-online) on ResNet-50, YouTube-VIS 2021, 8 processes of batch 1: the authors' recipe."""

_base_ = ["../_base_/axialvs_youtubevis2021.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
