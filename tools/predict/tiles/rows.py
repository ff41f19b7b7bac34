"""Label maps without seams for models that look at the whole picture.

Each layer runs on one part of the rows after another.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from terrazzo._pixel_limit import check_pixels
from terrazzo.spatial import Part, tiled
from terrazzo.spatial._operators import resize
from terrazzo.tools.data.windows import Windows
from terrazzo.tools.predict.tiles.labels import Segmentor
from terrazzo.tools.predict.tiles.stitching import Band


class ByRows:
    """A segmentor of mmsegmentation through `terrazzo.spatial.tiled`: exact, and the whole picture is in memory.

    Args:
        segmentor: the model's three steps.
        model: mmseg's `EncoderDecoder`; its modules get the forms of `terrazzo.spatial`, and it still works alone.
        rows: rows of a part.

    Raises:
        InputError: a module of the model is not known to `terrazzo.spatial`.
    """

    def __init__(self, segmentor: Segmentor, model: nn.Module, rows: int):
        self.segmentor, self.tiled = segmentor, tiled(_Labels(segmentor, model), rows, layout="NCHW")

    @torch.inference_mode()
    def bands(self, picture: Windows) -> Iterator[Band]:
        """One band, the label map of the whole picture; zeros lengthen the picture to multiples of the stride."""
        width, height = picture.width, picture.height
        check_pixels(f"picture {picture.name}", width, height)
        long = [-(-side // self.tiled.stride) * self.tiled.stride for side in (height, width)]
        inputs = self.segmentor.inputs([picture.read(0, 0, width, height)], (long[0], long[1]))
        yield Band(0, self.tiled(inputs)[0, 0, :height, :width])


class _Labels(nn.Module):
    """A segmentor with the steps behind it, so that logits of the picture's size exist for one part at a time."""

    def __init__(self, segmentor: Segmentor, model: nn.Module):
        super().__init__()
        self.segmentor, self.model = segmentor, model

    def spatial_forward(self, part: Part, x: Tensor) -> Tensor:
        logits = self.model(x)
        logits = resize(part, logits, (part.image.height, part.image.width), "bilinear", self.model.align_corners)
        return self.segmentor.labels(logits)[:, None].to(torch.int16).cpu()
