"""One image on one device, shard after shard: the same operators over virtual ranks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from terrazzo.errors import InputError
from terrazzo.spatial._allocator import returned_at_once
from terrazzo.spatial._cuts import Level
from terrazzo.spatial._entries import Entry
from terrazzo.spatial._groups import Group, LocalGroup
from terrazzo.spatial._parallelize import largest_stride, replace
from terrazzo.spatial._part import Part


class Tiled(nn.Module):
    """A model that computes each layer for one part of the rows after another; see `tiled`.

    Attributes:
        model: The model.
        rows: Rows of the image in a part.
        stride: Each part's first row is a multiple of it.
        layout: The layout of maps that the model returns; None to find it from their sizes.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: int,
        stride: int | None = None,
        layout: str | None = None,
        entries: Mapping[type, Entry] | None = None,
    ):
        super().__init__()
        if layout not in (None, *_ROWS):
            raise InputError(f"layout must be one of {', '.join(_ROWS)}, or None, got {layout!r}")
        stride = largest_stride(model) if stride is None else stride
        if rows < stride:
            raise InputError(f"rows must be at least the model's stride, {stride}, got {rows}")
        replace(model, True, entries)
        self.model, self.rows, self.stride, self.layout = model, rows, stride, layout

    def forward(self, x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        """Args:
        x: Images (B, C, H, W).
        arguments, options: Further arguments of the model.

        Returns:
            What the model returns for the whole image.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self(x, *arguments, **options)
        height, width = x.shape[2:]
        parts = max(1, -(-(height // self.stride) // (self.rows // self.stride)))

        def run(group: Group) -> tuple[Any, list[Level]]:
            with Part(group, height, width, self.stride).entered() as part:
                out = self.model(part.scatter(x), *arguments, **options)
            return out, part.levels()

        with returned_at_once(x.device):
            found = LocalGroup(parts).run(run)
            outs, levels = [out for out, _ in found], found[0][1]
            found.clear()
            return joined(outs, levels, self.layout)


_ROWS = {"NCHW": 2, "NHWC": 1}
"""The dimension of the rows in each layout."""


def joined(outs: list[Any], levels: list[Level], layout: str | None = None) -> Any:
    """The whole result of the parts' results: maps are put together, and what all parts have is taken once.

    Args:
        outs: The results; the list is emptied, so that a part's map is free as soon as the whole map has it.

    Raises:
        InputError: A tensor is neither a map of a known size nor the same on all ranks.
    """
    kind = type(outs[0])
    if isinstance(outs[0], torch.Tensor):
        return _joined_map(outs, levels, layout)
    if isinstance(outs[0], dict):
        keys = list(outs[0])
        items = _joined_items([[out[key] for key in keys] for out in outs], outs, levels, layout)
        return kind(zip(keys, items))
    if isinstance(outs[0], (list, tuple)):
        items = _joined_items([list(out) for out in outs], outs, levels, layout)
        return kind(*items) if hasattr(kind, "_fields") else kind(items)
    return outs[0]


def _joined_items(items: list[list[Any]], outs: list[Any], levels: list[Level], layout: str | None) -> list[Any]:
    outs.clear()
    for own in items:
        own.reverse()
    return [joined([own.pop() for own in items], levels, layout) for _ in range(len(items[0]))]


def _joined_map(maps: list[torch.Tensor], levels: list[Level], layout: str | None) -> torch.Tensor:
    if len(maps) == 1:
        return maps[0]
    shape = tuple(maps[0].shape)  # and no name for a part's map, which would hold it
    found = {}
    for name, dim in _ROWS.items() if len(shape) == 4 else ():
        for level in levels:
            counts = [end - start for start, end in level.rows]
            if layout in (None, name) and [y.shape[dim] for y in maps] == counts and shape[dim + 1] == level.width:
                found[name] = level
    if len(found) > 1:
        raise InputError(
            f"an output of {shape} in the first part may be rows of a map of "
            f"{' or of '.join(f'{level} in {name}' for name, level in found.items())}: pass layout='NCHW' or 'NHWC'"
        )
    for name, level in found.items():
        return maps[0] if level.whole else _one_after_another(maps, _ROWS[name], level)
    if len({y.shape for y in maps}) == 1:
        return maps[0]
    raise InputError(
        f"an output has the shapes {[tuple(y.shape) for y in maps]} in the parts, which make no map of a known size"
    )


def _one_after_another(maps: list[torch.Tensor], dim: int, level: Level) -> torch.Tensor:
    """`torch.cat(maps, dim)`, in the memory format of the maps; the list is emptied."""
    shape, strides = list(maps[0].shape), maps[0].stride()
    shape[dim] = level.height
    order = sorted(range(len(shape)), key=lambda axis: -strides[axis])
    out = torch.empty_permuted(shape, order, dtype=maps[0].dtype, device=maps[0].device)
    for start, end in level.rows:
        out.narrow(dim, start, end - start).copy_(maps.pop(0))
    return out


def tiled(
    model: nn.Module,
    rows: int = 1024,
    stride: int | None = None,
    layout: str | None = None,
    entries: Mapping[type, Entry] | None = None,
) -> Tiled:
    """Make a model that computes huge images exactly with the memory of a part of the rows.

        model = terrazzo.spatial.tiled(model.eval(), rows=512)
        maps = model(image)  # as the model's own, without gradients

    Each layer runs on one part of the rows after another; parts exchange the rows that a layer needs beyond its own.
    So temporary tensors of a layer exist for one part at a time, and maps between layers for the whole image. The
    result is the model's own up to rounding, also of models that look at the whole image.

    Args:
        model: Its modules must be in the table (docs/spatial.md). It still works alone.
        rows: Rows of the image in a part; parts have whole units of the stride, so this is approximate.
        stride: As in `parallelize`.
        layout: "NCHW" or "NHWC", the layout of maps that the model returns; None to find it from their sizes.
        entries: Entries for further classes.

    Raises:
        InputError: A module mixes positions and is not known; the message names it. Or `rows` is too small.
    """
    return Tiled(model, rows, stride, layout, entries)
