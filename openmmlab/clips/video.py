"""mmdet's Mask2Former for videos with a frozen backbone."""

from mmdet.models.vis.mask2former_vis import Mask2FormerVideo
from torch import nn


class CrossClipVideo(Mask2FormerVideo):
    """mmdet's `Mask2FormerVideo`, whose backbone is frozen and stays in evaluation, for a `CrossClipTrackHead`."""

    def __init__(self, **options):
        super().__init__(**options)
        self.backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode as PyTorch does; the backbone stays in evaluation."""
        super().train(mode)
        self.backbone.eval()
        return self
