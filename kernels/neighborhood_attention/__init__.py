"""Neighborhood attention with dilation and relative position bias, on maps and on sequences."""

import torch

from terrazzo.errors import InputError
from terrazzo.kernels.dispatch import arguments
from terrazzo.kernels.neighborhood_attention import op

__all__ = ["neighborhood_attention"]


def _per_axis(value: int | tuple[int, ...] | list[int], name: str, axes: int, least: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
    if len(values) != axes:
        raise InputError(f"{name} must be an int or {axes} ints for a {axes}-D input, got {value!r}")
    return tuple(arguments.whole(item, name, least) for item in values)


def _hint(query: torch.Tensor, kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> str:
    """A hint for inputs whose sizes would fit with the heads in front, the layout of older versions of NATTEN."""
    axes = len(kernel_size)
    if any(length < kernel * step for length, kernel, step in zip(query.shape[2:-1], kernel_size, dilation)):
        return ""
    order = (0, *range(2, 2 + axes), 1, 2 + axes)
    return f"; if axis 1 holds the heads, as in older versions of NATTEN, pass x.permute{order} for each tensor"


def _check(query, key, value, kernel_size, dilation, rpb) -> None:
    """Raise `InputError` for arguments that the definition does not allow."""
    if not query.shape == key.shape == value.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise InputError(f"query, key and value must have one shape, got {shapes}")
    arguments.check_one_dtype(query=query, key=key, value=value)
    if arguments.any_empty(*query.shape[-2:]):
        raise InputError(f"there must be at least 1 head and a head_dim of at least 1, got {tuple(query.shape)}")
    for axis, (length, kernel, step) in enumerate(zip(query.shape[1:-2], kernel_size, dilation)):
        if length < kernel * step:
            raise InputError(
                f"axis {axis} has {length} positions, fewer than kernel_size x dilation = {kernel} x {step} = "
                f"{kernel * step}; pad the map to {kernel * step} before projecting it"
                + _hint(query, kernel_size, dilation)
            )
    if rpb is not None:
        expected = (query.shape[-2], *(2 * kernel - 1 for kernel in kernel_size))
        if tuple(rpb.shape) != expected:
            raise InputError(
                f"rpb must have shape (heads, 2 * kernel_size - 1, ...) = {expected}, got {tuple(rpb.shape)}"
                + (_hint(query, kernel_size, dilation) if rpb.dim() and rpb.shape[0] == query.shape[1] else "")
            )


def neighborhood_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | tuple[int, ...],
    dilation: int | tuple[int, ...] = 1,
    rpb: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of every position to the `kernel_size` nearest positions of its residue class, per axis.

    Near a border the window is shifted inward: it keeps its size and contains no padding. With dilation d a position
    attends to positions that are congruent to it modulo d; d need not divide the map.

    Args:
        query, key, value: (B, H, W, heads, head_dim), or (B, L, heads, head_dim) for sequences; any strides.
        kernel_size: Window per axis, at least 2, odd or even (an even window has one more position before the query).
        dilation: Step per axis. Every axis must hold kernel_size * dilation positions.
        rpb: Relative position bias, (heads, 2 * kernel_h - 1, 2 * kernel_w - 1), for sequences (heads,
            2 * kernel - 1): indexed by key minus query in units of the dilation, plus kernel - 1; added unscaled.
        scale: Multiplies query times key; head_dim ** -0.5 by default.
        backend: "auto", "fused", "portable" or "reference"; see `terrazzo.kernels.use_backend`.

    Returns:
        A tensor like `query`.

    Raises:
        InputError: A shape, dtype, kernel size or dilation that the definition does not allow.
        BackendError: `backend` names a form that cannot run here.

    Source: Neighborhood Attention Transformer, arXiv 2204.07143, section 3.1; Dilated Neighborhood Attention
    Transformer, arXiv 2209.15001, section 3. The bias is outside of the scaling, as in the authors' code.
    """
    arguments.check_tensors({"query": query, "key": key, "value": value}, rpb=rpb)
    axes = query.dim() - 3
    if axes not in (1, 2):
        raise InputError(
            f"query must be (B, H, W, heads, head_dim) or (B, L, heads, head_dim), got {tuple(query.shape)}"
        )
    kernel_size = _per_axis(kernel_size, "kernel_size", axes, 2)
    dilation = _per_axis(dilation, "dilation", axes, 1)
    _check(query, key, value, kernel_size, dilation, rpb)
    scale = query.shape[-1] ** -0.5 if scale is None else arguments.finite(scale, "scale")
    if axes == 1:  # a sequence is a map of one row
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        rpb = None if rpb is None else rpb.unsqueeze(1)
        kernel_size, dilation = (1, *kernel_size), (1, *dilation)
    out = op.run(query, key, value, rpb, kernel_size, dilation, scale, backend)
    return out.squeeze(1) if axes == 1 else out
