"""The wrapper of backbones for OpenMMLab."""

from terrazzo.spatial._entries import OWN

ENTRIES = {"TerrazzoBackbone": OWN}
