"""Backbones for torchvision's detectors: maps, then torchvision's feature pyramid."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from terrazzo.errors import InputError
from terrazzo.integrations._frameworks import framework
from terrazzo.integrations.maps import Maps

EXTRAS = ("pool", "p6p7", None)


class PyramidBackbone(nn.Module):
    """Maps of a backbone, and a feature pyramid over them, in the form that torchvision's detectors want.

    Attributes:
        out_channels: Channels of every map, which torchvision's detectors read.
        strides: Stride of every map, finest first.
        names: Names of the maps, finest first. RoI poolings read the maps named by digits.
    """

    def __init__(self, body: Maps, out_channels: int, extra: str | None, norm_layer: type[nn.Module] | None = None):
        """Args: see `torchvision_backbone`."""
        super().__init__()
        if extra not in EXTRAS:
            raise InputError(f"extra must be 'pool', 'p6p7' or None, got {extra!r}")
        pyramids = framework("torchvision.ops.feature_pyramid_network", "torchvision")
        blocks = {
            "pool": pyramids.LastLevelMaxPool,
            "p6p7": lambda: pyramids.LastLevelP6P7(out_channels, out_channels),
            None: lambda: None,
        }
        self.body = body
        self.fpn = pyramids.FeaturePyramidNetwork(body.channels, out_channels, blocks[extra](), norm_layer)
        self.out_channels = out_channels
        further = {"pool": ["pool"], "p6p7": ["p6", "p7"], None: []}[extra]
        self.names = [*(str(index) for index in range(len(body.strides))), *further]
        self.strides = [body.strides[0] * 2**index for index in range(len(self.names))]

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        """From images B C H W to maps by name, finest first."""
        return self.fpn(OrderedDict(zip(self.names, self.body(x))))

    def anchors(self, scales: Sequence[float] = (8,), ratios: Sequence[float] = (0.5, 1.0, 2.0)) -> nn.Module:
        """An anchor generator with anchors for each map.

        Args:
            scales: Sides of the anchors, in strides of their map. Faster R-CNN has (8,); RetinaNet has
                (4, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)).
            ratios: Heights divided by widths.
        """
        generators = framework("torchvision.models.detection.anchor_utils", "torchvision")
        sizes = tuple(tuple(int(stride * scale) for scale in scales) for stride in self.strides)
        return generators.AnchorGenerator(sizes, (tuple(ratios),) * len(sizes))


def torchvision_backbone(
    name: str,
    pretrained: bool = False,
    out_channels: int = 256,
    extra: str | None = "pool",
    out_indices: Sequence[int] | None = None,
    norm_layer: type[nn.Module] | None = None,
    **kwargs: Any,
) -> PyramidBackbone:
    """Make a backbone for torchvision's detectors out of any model with a pyramid, of terrazzo or timm.

        backbone = terrazzo.torchvision_backbone("dinat_mini", pretrained=True)
        model = torchvision.models.detection.MaskRCNN(backbone, num_classes=3)

        backbone = terrazzo.torchvision_backbone("dinat_mini", extra="p6p7", out_indices=(1, 2, 3))
        model = torchvision.models.detection.RetinaNet(backbone, num_classes=3)

    With four maps of strides 4 to 32, the anchors that torchvision chooses by default fit. For other maps give the
    detector `backbone.anchors()`.

    Args:
        name: A model of `timm.list_models()`.
        pretrained: Load the weights that timm knows.
        out_channels: Channels of every map of the pyramid.
        extra: "pool" for one map more (Faster and Mask R-CNN), "p6p7" for two maps more by convolutions (RetinaNet,
            FCOS), None for none.
        out_indices: The stages that the pyramid reads; None for the model's default.
        norm_layer: A norm after each convolution of the pyramid; None for no norm.
        **kwargs: Arguments of the model, such as `drop_path_rate` or `norm_outputs`.

    Raises:
        InputError: There is no such model, its maps are no pyramid, or `extra` is not one of these.
    """
    return PyramidBackbone(Maps(name, pretrained, out_indices, **kwargs), out_channels, extra, norm_layer)
