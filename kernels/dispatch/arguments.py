"""Checks of arguments that all operators share. Each argument that an operator cannot take gets a clear error."""

import math
import operator
from collections.abc import Mapping

import torch

from terrazzo.errors import InputError


def check_tensors(required: Mapping[str, object], **optional: object) -> None:
    """Check that all arguments are tensors of real numbers on one device; an optional argument may be None.

    Raises:
        InputError: An argument is not; the error names the first.
    """
    check_together(required, **optional)
    for name, x in (*required.items(), *optional.items()):
        if x is not None and not x.is_floating_point():
            raise InputError(f"{name} must be real numbers, got {_words(x.dtype)}; convert it to a floating dtype")


def check_together(required: Mapping[str, object], **optional: object) -> None:
    """Like `check_tensors`, for tensors of any dtype."""
    where, device = "", None
    for name, x in (*required.items(), *optional.items()):
        if x is None and name in optional:
            continue
        if not isinstance(x, torch.Tensor):
            raise InputError(f"{name} must be a tensor, got {type(x).__name__}")
        if device is None:
            where, device = name, x.device
        elif x.device != device:
            raise InputError(f"{name} must be on the same device as {where}, {device}, and is on {x.device}")


def check_one_dtype(**tensors: torch.Tensor) -> None:
    """Check that all tensors have the same dtype.

    Raises:
        InputError: The dtypes differ.
    """
    dtypes = [x.dtype for x in tensors.values()]
    if any(dtype != dtypes[0] for dtype in dtypes):
        raise InputError(
            f"{_listed(list(tensors))} must have one floating dtype, got {_listed(list(map(_words, dtypes)))}"
        )


def any_empty(*sizes: int) -> bool:
    """Whether one of the sizes is 0. The result is a plain bool even for symbolic sizes; a comparison's is not."""
    for size in sizes:  # noqa: SIM110
        if size < 1:
            return True
    return False


def whole(value: object, name: str, least: int | None = None) -> int:
    """Convert an integer of any type (numpy's, too) to a Python int.

    Raises:
        InputError: `value` is not a whole number, or is less than `least`.
    """
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        try:
            value = operator.index(None if isinstance(value, bool) else value)
        except TypeError:
            raise InputError(f"{name} must be an int, got {value!r}") from None
    if least is not None and value < least:
        raise InputError(f"{name} must be at least {least}, got {value}")
    return value


def finite(value: object, name: str) -> float:
    """Convert a number to a float.

    Raises:
        InputError: `value` is not a finite number, or is a tensor with a gradient, which would be lost.
    """
    if isinstance(value, torch.Tensor) and value.requires_grad:
        raise InputError(f"{name} must be a number, got a tensor that requires a gradient: multiply by it outside")
    try:
        found = float(None if isinstance(value, str) else value)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name} must be a number, got {value!r}") from None
    # Under a compiler the number may be symbolic.
    if not torch.compiler.is_compiling() and not math.isfinite(found):
        raise InputError(f"{name} must be a finite number, got {found}")
    return found


def check_threshold(threshold: torch.Tensor | float) -> None:
    """Check the threshold that scores are compared with. A tensor on a GPU is not read, since that would synchronize.

    Raises:
        InputError: The threshold is NaN, which no score exceeds.
    """
    if torch.compiler.is_compiling():
        return
    if isinstance(threshold, torch.Tensor):
        unusable = threshold.device.type == "cpu" and bool(threshold.isnan().any())
    else:
        unusable = math.isnan(_number(threshold))
    if unusable:
        raise InputError("threshold must be a number, got nan")


def _number(threshold: object) -> float:
    try:
        return float(None if isinstance(threshold, str) else threshold)
    except (TypeError, ValueError):
        raise InputError(f"threshold must be a number or a tensor, got {threshold!r}") from None


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
