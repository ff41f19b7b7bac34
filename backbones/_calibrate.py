"""`terrazzo.calibrate`: set what converted layers must learn from images without training."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from terrazzo.backbones._modes import evaluating
from terrazzo.backbones.mixers import Mixer
from terrazzo.errors import InputError


class NotCalibratedError(InputError):
    """Nothing of a model could be calibrated, so that it is as it was."""


def calibrate(model: nn.Module, images: torch.Tensor | Iterable[torch.Tensor], **options: Any) -> nn.Module:
    """Set thresholds and budgets of a converted model's mixers from images, and return the model.

    The images run through the model in evaluation mode without gradients. Each layer calibrates itself on what reaches
    it, and passes on what it computes then. What it finds is in the model's state dict. Any loop may watch: a
    generator of batches runs between the batches.

        model = terrazzo.convert_attention(timm.create_model("vit_small_patch14_dinov2", img_size=896), "sale")
        terrazzo.calibrate(model, images, error=0.2)

    Args:
        model: what `terrazzo.convert_attention` returns.
        images: batches (B, 3, H, W), or one batch.
        **options: of the `calibrate` methods of the model's mixers; see the classes in `terrazzo.backbones.mixers`.

    Raises:
        InputError: No layer's mixer can be calibrated, no image is given, an option is not valid, or the images are so
            small that all these layers compute softmax attention.
    """
    found: list[Any] = [x for x in model.modules() if isinstance(x, Mixer) and hasattr(x, "calibrate")]
    if not found:
        raise NotCalibratedError(
            "no layer of the model can be calibrated: convert layers to a mixer with thresholds or budgets, "
            "for example terrazzo.convert_attention(model, 'sale')"
        )
    batches = [images] if isinstance(images, torch.Tensor) else images
    runs = _Runs(options)
    hooks = [mixer.register_forward_pre_hook(runs) for mixer in found]
    before = [{key: value.clone() for key, value in mixer.state_dict().items()} for mixer in found]
    for mixer in found:
        mixer.reset()
    try:
        with torch.no_grad():
            for batch in batches:
                runs.batches += 1
                with evaluating(model):
                    model(batch)
        if not runs.batches:
            raise InputError("images holds no batch: give at least one batch (B, 3, H, W)")
        if not runs.calibrated:
            raise NotCalibratedError(
                f"no layer was calibrated, because the mixers compute softmax attention on images so small "
                f"({runs.reason}): give larger images"
            )
    except BaseException:
        for mixer, state in zip(found, before):
            mixer.load_state_dict(state)
        raise
    finally:
        for hook in hooks:
            hook.remove()
    return model


class _Runs:
    """Calibrates a mixer before each of its forward passes, and counts."""

    def __init__(self, options: dict[str, Any]):
        self.options, self.batches, self.calibrated, self.reason = options, 0, 0, ""

    def __call__(self, mixer: Any, arguments: tuple[Any, ...]) -> None:
        place = arguments[3]
        if place.grid is None:  # the mixer itself refuses merged tokens
            return
        reason = mixer.dense(place.grid, place.prefix)
        if reason is not None:
            self.reason = reason
            return
        try:
            mixer.calibrate(*arguments, **self.options)
        except TypeError as error:
            if self.options and "unexpected keyword" in str(error):
                raise InputError(f"{mixer.name!r} cannot be calibrated with {', '.join(self.options)}") from error
            raise
        self.calibrated += 1
