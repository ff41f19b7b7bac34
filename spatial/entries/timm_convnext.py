"""timm's ConvNeXt and ConvNeXt V2: convolutions, and layers of single positions."""

from terrazzo.spatial._entries import OWN

ENTRIES = dict.fromkeys(("ConvNeXt", "ConvNeXtStage", "ConvNeXtBlock", "Downsample"), OWN)
