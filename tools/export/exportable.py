"""Models as one graph from raw pixels to results: normalisation in front, resizing and arg max behind."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from terrazzo.backbones._shared import shared_copy
from terrazzo.errors import InputError


class RawClassifier(nn.Module):
    """A classifier that takes RGB pixels as they are.

    Args:
        model: from a normalised (B, 3, H, W) to logits (B, classes).
        mean: the mean of each channel, for pixels in 0..1.
        std: the standard deviation of each channel, for pixels in 0..1.
    """

    output_names: tuple[str, ...] = ("logits",)

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.model = model
        self.register_buffer("mean", 255 * torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """From (B, 3, H, W), float RGB in 0..255, to logits (B, classes)."""
        return self.model(self.normalised(image))

    def normalised(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


class RawFeatures(RawClassifier):
    """A timm model's pyramid from raw RGB pixels: an output `strideN` for each of its maps.

    Args:
        model: a timm model with `forward_intermediates`.

    Raises:
        InputError: the model gives no feature maps.
    """

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__(model, mean, std)
        if not hasattr(model, "forward_intermediates"):
            raise InputError(f"{type(model).__name__} has no forward_intermediates, so it gives no feature maps")
        info = model.feature_info.info if hasattr(model.feature_info, "info") else model.feature_info
        strides = [entry["reduction"] for entry in info]
        # Blocks of one stride are told apart by their number.
        self.output_names = tuple(
            f"stride{stride}" if strides.count(stride) == 1 else f"block{index}_stride{stride}"
            for index, stride in enumerate(strides)
        )

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """From (B, 3, H, W), float RGB in 0..255, to maps (B, C, H / stride, W / stride)."""
        return tuple(self.model.forward_intermediates(self.normalised(image), intermediates_only=True))


class RawRestorer(nn.Module):
    """A restorer that takes and gives RGB pixels in 0..255.

    Args:
        model: from (B, 3, H, W) in 0..1 to (B, 3, s H, s W), with an attribute `upscale`, which is s.
    """

    output_names = ("restored",)

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """From (B, 3, H, W), float RGB in 0..255, to (B, 3, s H, s W) in 0..255."""
        return (255 * self.model(image / 255)).clamp(0, 255)


class RawSegmentor(nn.Module):
    """An mmseg segmentor that takes RGB pixels as they are and gives results at their size.

    Whatever test mode the config has, the image is seen as a whole (mode `whole`), without flips.

    Args:
        segmentor: an mmseg EncoderDecoder.
    """

    output_names = ("logits", "labels")

    def __init__(self, segmentor: nn.Module):
        super().__init__()
        preprocessor = segmentor.data_preprocessor
        # In a tuple it is not a submodule: this module has a copy of it, perhaps with other forms of some layers.
        self._original = (segmentor,)
        self.segmentor = _with_open_sizes(_fixed(segmentor))
        self.swap = not preprocessor.channel_conversion
        self.normalise = bool(getattr(preprocessor, "_enable_normalize", False))
        if self.normalise:
            self.register_buffer("mean", preprocessor.mean.detach().clone(), persistent=False)
            self.register_buffer("std", preprocessor.std.detach().clone(), persistent=False)
        if segmentor.num_classes < 1 or segmentor.out_channels < 1:
            raise InputError(f"the segmentor says it has {segmentor.num_classes} classes; there is nothing to export")

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """From (B, 3, H, W), float RGB in 0..255, to logits (B, classes, H, W) and labels (B, H, W)."""
        return self._results(self.segmentor, image)

    @torch.no_grad()
    def reference(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The results of mmseg's own, unchanged model for the same pixels; as `forward`."""
        return self._results(self._original[0], image)

    def _results(self, segmentor: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
        # If the preprocessor does not turn BGR files into RGB, the network wants BGR.
        image = image.flip(1) if self.swap else image
        image = (image - self.mean) / self.std if self.normalise else image
        size = tuple(image.shape[2:])
        logits = segmentor.encode_decode(image, [{"img_shape": size, "ori_shape": size, "pad_shape": size}])
        if logits.shape[1] == 1:
            return logits, (logits[:, 0].sigmoid() > segmentor.decode_head.threshold).long()
        return logits, logits.argmax(dim=1)


class _Enlarged(nn.Module):
    """mmseg's `Upsample` by a whole factor, which leaves height and width open: mmseg's sizes become constants."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.factor, self.mode, self.align_corners = int(layer.scale_factor), layer.mode, layer.align_corners

    def forward(self, x: Tensor) -> Tensor:
        size = [side * self.factor for side in x.shape[-2:]]
        return F.interpolate(x, size, mode=self.mode, align_corners=self.align_corners)


def _enlarges(part: nn.Module) -> bool:
    if type(part).__module__ != "mmseg.models.utils.wrappers" or type(part).__name__ != "Upsample" or part.size:
        return False
    return isinstance(part.scale_factor, float) and part.scale_factor.is_integer()


def _with_open_sizes(segmentor: nn.Module) -> nn.Module:
    """The segmentor, or a copy with the same weights whose enlarging layers can be exported with open sizes."""
    if not any(map(_enlarges, segmentor.modules())):
        return segmentor
    segmentor = shared_copy(segmentor)
    for part in list(segmentor.modules()):
        for name, child in part.named_children():
            if _enlarges(child):
                setattr(part, name, _Enlarged(child))
    return segmentor


def _fixed(segmentor: nn.Module) -> nn.Module:
    """The segmentor, or a form of it that can be exported if its deformable attention cannot."""
    # its layers come from mmdet, which other segmentors do without
    if not any(type(part).__name__ == "MSDeformAttnPixelDecoder" for part in segmentor.modules()):
        return segmentor
    from terrazzo.tools.export.detectors.fixed_maps import with_fixed_maps

    return with_fixed_maps(segmentor)
