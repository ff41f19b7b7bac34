"""Restored pictures, and how far they are from the truth where pictures are degraded on purpose."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from terrazzo.degradations import Degradation, degradation_of
from terrazzo.degradations.bicubic import enlarged
from terrazzo.degradations.pixels import generator_of, in_multiples, to_image, to_pixels
from terrazzo.degradations.quality import quality
from terrazzo.errors import InputError
from terrazzo.restoration._reflection import lengthened
from terrazzo.tools.predict.draw import panels, shrunk
from terrazzo.tools.predict.prediction import Prediction, by_shape

_PANEL = 4096
"""Pixels of the longer side of each picture in a drawing, at most."""


class Restoring:
    """What makes pictures from pictures, whatever runs it.

    Attributes:
        scale: how many times larger restored pictures are.
        size: (H, W) of a file's pictures; None for any size.
        stride: a result may depend on where a picture begins, in multiples of it; None if that is not known.
        degradation: what the model was trained against, as settings; None if that is not known.
    """

    scale: int
    size: tuple[int, int] | None = None
    stride: int | None = None
    degradation: Mapping[str, Any] | None = None

    def restored(self, inputs: Tensor) -> Tensor:
        """From (B, 3, H, W) in 0..1 to (B, 3, s H, s W), on the CPU."""
        raise NotImplementedError

    def predict(self, images: Sequence[Image.Image]) -> list[Prediction]:
        """The predictions of pictures in RGB, in their own size."""
        return by_shape(images, lambda image: image.size, self._together)

    def inputs(self, images: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
        """Pictures as the model takes them, (B, 3, h, w), reflected to `size` (h, w), or to a file's fixed size."""
        return torch.stack([reflected(image, self.size or size) for image in images])

    def _together(self, images: list[Image.Image]) -> list[Prediction]:
        width, height = images[0].size
        if self.size is not None and (height > self.size[0] or width > self.size[1]):
            raise InputError(
                f"the file takes pictures of {self.size[1]}x{self.size[0]} pixels, and this has {width}x{height}: cut "
                "it into tiles of the file's size with --tile, or export a file with --dynamic hw"
            )
        found = self.restored(self.inputs(images, (height, width)))
        found = found[:, :, : height * self.scale, : width * self.scale]
        return [restored_prediction(image, to_image(own), self.scale) for image, own in zip(images, found)]


class RestorePredictor(Restoring):
    """A restorer of a config, or a restoration network of timm.

    Args:
        model: from (B, 3, H, W) in 0..1 to (B, 3, s H, s W), with an attribute `upscale`, which is s.
        device: where to compute.
        degradation: as in `Restoring`; None for bicubic reduction if the model enlarges.
        stride: as in `Restoring`, and known.
    """

    stride: int

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        degradation: Mapping[str, Any] | None = None,
        stride: int = 1,
    ):
        self.model, self.device, self.stride = model.to(device).eval(), device, stride
        self.scale = model.upscale
        self.degradation = degradation
        if degradation is None and self.scale > 1:
            self.degradation = {"type": "Bicubic", "scale": self.scale}

    @torch.inference_mode()
    def restored(self, inputs: Tensor) -> Tensor:
        return self.model(inputs.to(self.device)).float().cpu()


class Degraded(NamedTuple):
    """A picture that was made worse on purpose.

    Attributes:
        image: the degraded picture, as a file of 8 bits.
        truth: the picture, with sides in multiples of the scale.
    """

    image: Image.Image
    truth: Image.Image


class Degrader:
    """Makes pictures worse before a restorer sees them, and compares its results with the pictures.

    Args:
        settings: of the degradation; None if the model does not say what it was trained against.

    Raises:
        InputError: there are no settings.
    """

    def __init__(self, settings: Mapping[str, Any] | None):
        if settings is None:
            raise InputError("the model does not say what it restores pictures from: leave --degrade out")
        self.degradation: Degradation = degradation_of(settings)

    def __call__(self, image: Image.Image, name: str) -> Degraded:
        """The degraded picture; pictures of one name get the same random numbers each time."""
        scale = self.degradation.scale
        if min(image.size) < scale:
            raise InputError(f"the picture {name} has {image.width}x{image.height} pixels, less than the scale {scale}")
        clean = in_multiples(to_pixels(image), scale)
        return Degraded(to_image(self.degradation(clean, generator_of(name))), to_image(clean))

    def compared(self, prediction: Prediction, pair: Degraded) -> Prediction:
        """The prediction of a degraded picture with the truth: figures in the record, and three pictures drawn.

        The PSNR of a picture that is exactly the truth is infinite, and None in the record.

        Raises:
            InputError: the model does not undo the degradation's scale, or the picture is too small for SSIM.
        """
        assert prediction.restored is not None
        scale = self.degradation.scale
        border = scale if scale > 1 else 0
        truth = to_pixels(pair.truth)
        before = _grown(pair.image, scale)
        record = dict(prediction.record)
        record["degradation"] = self.degradation.task
        for key, image in (("before", before), ("after", prediction.restored)):
            figures = quality(to_pixels(image), truth, border)
            # JSON knows no infinity, which is the PSNR of an exact picture
            record[key] = {name: round(value, 4) if math.isfinite(value) else None for name, value in figures.items()}
        draw = functools.partial(_sheet, before, prediction.restored, scale, pair.truth)
        return dataclasses.replace(prediction, record=record, draw=draw)


def restored_prediction(image: Image.Image, restored: Image.Image, scale: int) -> Prediction:
    """A restored picture, drawn beside the picture before.

    Args:
        image: the picture, H x W.
        restored: s H x s W.
        scale: s.
    """
    size = {"width": restored.width, "height": restored.height}
    record = {"task": "restoration", "scale": scale, "restored": size}
    return Prediction(record, lambda: _sheet(_grown(image, scale), restored, scale), restored=restored)


def _sheet(before: Image.Image, after: Image.Image, scale: int, truth: Image.Image | None = None) -> Image.Image:
    """The pictures beside each other; large pictures are drawn smaller."""
    title = "before" if scale == 1 else f"before (bicubic x{scale})"
    pictures = [before, after] if truth is None else [before, after, truth]
    return panels([shrunk(picture, _PANEL) for picture in pictures], [title, "after", "truth"][: len(pictures)])


def _grown(image: Image.Image, scale: int) -> Image.Image:
    """The picture enlarged by MATLAB's bicubic: what a restorer is compared with."""
    return image if scale == 1 else to_image(enlarged(to_pixels(image), scale))


def reflected(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Pixels (3, h, w) in 0..1, reflected on the right and below to `size`, as a restorer reflects a whole picture."""
    return lengthened(lengthened(to_pixels(image), 1, 1, size[0]), 2, 1, size[1])
