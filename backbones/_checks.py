"""Checks of a backbone's input: the image, and numbers among the arguments."""

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch

from terrazzo.errors import InputError
from terrazzo.kernels.dispatch.exporting import is_exporting, is_open_from_one


def check_image(x: torch.Tensor, channels: int) -> None:
    """Check that `x` is a batch of images with the given number of channels.

    Raises:
        InputError: `x` is not a floating tensor (B, channels, H, W), or an exporter would fix its batch at 1.
    """
    if is_exporting():  # the other sizes may be symbolic, and the exporting program has run the model before
        if is_open_from_one(x.shape[0]):
            raise InputError("an open batch is exported from an example of 2 images or more, got 1")
        return
    wanted = f"the model takes a floating tensor of images (B, {channels}, H, W)"
    if not isinstance(x, torch.Tensor):
        raise InputError(f"{wanted}, got {type(x).__name__}")
    if x.dim() != 4 or x.shape[1] != channels:
        hint = ""
        if x.dim() == 3:
            hint = ": add the batch, x.unsqueeze(0)"
        elif x.dim() == 4 and x.shape[3] == channels:
            hint = ": channels come second, x.permute(0, 3, 1, 2)"
        elif x.dim() == 4:
            hint = f": create the model with in_chans={x.shape[1]}"
        raise InputError(f"{wanted}, got shape {tuple(x.shape)}{hint}")
    if not x.is_floating_point():
        raise InputError(f"{wanted}, got {x.dtype}: scale and normalise it, x.float() / 255")


def number(name: str, value: Any) -> float | int:
    """Convert a finite number to Python's int or float; takes NumPy's and 0-d tensors, but not text or bools.

    Raises:
        InputError: `value` is not a finite number.
    """
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InputError(f"{name} must be a finite number, got {value!r}")
    return int(value) if isinstance(value, Integral) else float(value)


def whole(name: str, value: Any) -> int:
    """Like `number`, for whole numbers.

    Raises:
        InputError: `value` is not a whole number.
    """
    found = number(name, value)
    if found != int(found):
        raise InputError(f"{name} must be a whole number, got {value!r}")
    return int(found)


def _listed(name: str, values: Any) -> Sequence[Any]:
    zero_dim = getattr(values, "ndim", 1) == 0
    if isinstance(values, (str, bytes)) or zero_dim or not isinstance(values, Iterable):
        raise InputError(f"{name} must be a sequence of numbers, for example (1, 2), got {values!r}")
    return list(values)


def numbers(name: str, values: Any) -> tuple[float | int, ...]:
    """Convert a sequence, or any iterable, of numbers; see `number`.

    Raises:
        InputError: `values` is not a sequence of finite numbers.
    """
    return tuple(number(name, value) for value in _listed(name, values))


def wholes(name: str, values: Any) -> tuple[int, ...]:
    """Like `numbers`, for whole numbers.

    Raises:
        InputError: `values` is not a sequence of whole numbers.
    """
    return tuple(whole(name, value) for value in _listed(name, values))


def sides(name: str, value: Any) -> tuple[int, int]:
    """The height and width of an image: of a number, both are the number; timm takes both forms, too.

    Raises:
        InputError: `value` is neither a whole number nor a pair of them, or a side is below 1.
    """
    found = wholes(name, value) if isinstance(value, (list, tuple)) else (whole(name, value),) * 2
    if len(found) != 2 or min(found) < 1:
        raise InputError(f"{name} must be a side of 1 or more, or height and width, got {value!r}")
    return found
