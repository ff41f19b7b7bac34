"""Necks that mmdet and mmseg lack; `terrazzo.openmmlab` registers them."""

from terrazzo.necks.finer_level import FinerLevel as FinerLevel
from terrazzo.necks.plain_pyramid import PlainPyramid as PlainPyramid
from terrazzo.necks.restorer_unet import RestorerUNet as RestorerUNet
from terrazzo.necks.simple_feature_pyramid import SimpleFeaturePyramid as SimpleFeaturePyramid

__all__ = ["FinerLevel", "PlainPyramid", "RestorerUNet", "SimpleFeaturePyramid"]
