"""One image over several ranks: the modules of a model get the forms of the table, in place."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from terrazzo.errors import InputError
from terrazzo.spatial._cuts import rows
from terrazzo.spatial._entries import Entry, find
from terrazzo.spatial._groups import Group, LocalGroup, as_group
from terrazzo.spatial._part import Part, active


class Replaced:
    """A method of a module that works on its rank's rows inside of a forward pass of the whole model.

    Attributes:
        name: The module's name in the model.
        alone: Whether the module's own method runs outside of a forward pass; else a call there is an error.
    """

    def __init__(self, module: nn.Module, name: str, entry: Entry, alone: bool):
        self.module, self.name, self.entry, self.alone = module, name, entry, alone

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        part = active()
        if part is None:
            if self.alone:
                return getattr(type(self.module), self.entry.method)(self.module, *arguments, **options)
            raise InputError(
                f"{self.name} was parallelized: call the whole model, or use `with part.entered():` (docs/spatial.md)"
            )
        assert self.entry.run is not None
        before, part.at = part.at, self.name
        part.depth += 1
        try:
            return self.entry.run(part, self.module, *arguments, **options)
        finally:
            part.at = before
            part.depth -= 1


class Whole:
    """The forward pass of a parallelized model, which begins and ends the work on an image."""

    def __init__(self, model: nn.Module, inner: Any, group: Group, stride: int):
        self.model, self.inner, self.group, self.stride = model, inner, group, stride

    def __deepcopy__(self, memo: dict) -> "Whole":
        model = memo.get(id(self.model), self.model)
        inner = self.inner
        if isinstance(inner, Replaced):
            inner = Replaced(model, inner.name, inner.entry, inner.alone)
        return Whole(model, inner, self.group, self.stride)

    def __call__(self, x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        run = self.inner or type(self.model).forward.__get__(self.model)
        if active() is not None:
            return run(x, *arguments, **options)
        with part_of(x, self.group, self.stride).entered():
            return run(x, *arguments, **options)


def part_of(x: torch.Tensor, group: Group, stride: int) -> Part:
    """The part of a rank that has the rows `x` (B, C, h, W) of an image.

    Raises:
        InputError: The ranks have other rows than `rows` gives them.
    """
    found = group.objects(tuple(x.shape[2:]))
    height, width = sum(rows_ for rows_, _ in found), found[0][1]
    wanted = [(end - start, width) for start, end in rows(height, group.size, stride)]
    if found != wanted:
        raise InputError(
            f"the ranks have {found} rows and columns of the image; they must have {wanted}: "
            f"cut it with terrazzo.spatial.scatter(image, stride={stride})"
        )
    return Part(group, height, width, stride)


def replace(model: nn.Module, alone: bool, entries: Mapping[type, Entry] | None = None) -> None:
    """Give the modules of a model the forms of the table.

    Raises:
        InputError: Some modules have no entry, or options that their entry does not take; nothing has changed.
    """
    more = entries or {}
    found, refused = [], []
    for name, module in _visited(model, "", more, set()):
        entry = find(type(module), more)
        reason = "no entry" if entry is None else entry.check(module) if entry.check else None
        if reason:
            kind = type(module)
            refused.append(f"{name or 'the model'} ({kind.__module__}.{kind.__qualname__}: {reason})")
        elif entry is not None:
            found += [(module, name or "the model", form) for form in (entry, *entry.also) if form.run is not None]
    if refused:
        more_text = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise InputError(
            f"the model has modules that are not known to work on a part of the rows: {'; '.join(refused[:3])}"
            f"{more_text}; give them an entry (docs/spatial.md)"
        )
    for module, name, entry in found:
        setattr(module, entry.method, Replaced(module, name, entry, alone))


def _visited(
    module: nn.Module, name: str, more: Mapping[type, Entry], seen: set[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """All modules but those that an entry keeps as they are."""
    if module in seen:
        return
    seen.add(module)
    yield name, module
    entry = find(type(module), more)
    kept = () if entry is None else entry.kept
    for child_name, child in module.named_children():
        if "*" not in kept and child_name not in kept:
            yield from _visited(child, f"{name}.{child_name}" if name else child_name, more, seen)


def restore(model: nn.Module) -> nn.Module:
    """Undo `parallelize`: every module has its own methods again."""
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if isinstance(value, (Replaced, Whole))]:
            delattr(module, name)
    return model


def largest_stride(model: nn.Module) -> int:
    """The least common multiple of the strides that the model or its backbone states, 32 at least."""
    strides = {32}
    for module in model.modules():
        info = getattr(module, "feature_info", None)
        for entry in getattr(info, "info", info) or ():
            if isinstance(entry, dict) and isinstance(entry.get("reduction"), int):
                strides.add(entry["reduction"])
    return math.lcm(*strides)


def parallelize(
    model: nn.Module,
    group: "dist.ProcessGroup | Group | None" = None,
    axis: str = "rows",
    stride: int | None = None,
    entries: Mapping[type, Entry] | None = None,
) -> nn.Module:
    """Make a model work on one image that several ranks share; changes the model in place, and returns it.

        model = terrazzo.spatial.parallelize(model)  # in each process that torchrun started
        y = model(terrazzo.spatial.scatter(image))   # the own rows of the outputs
        loss.backward()                              # of the local sum divided by the count of all ranks
        terrazzo.spatial.sum_gradients(model)

    Parameters and state dict stay as they are. Forward hooks see local rows.

    Args:
        model: Its modules must be in the table (docs/spatial.md).
        group: The ranks that share an image; None for all processes.
        axis: "rows": the only axis along which images are cut.
        stride: Each rank's first row is a multiple of it. By default the model's largest stride, 32 at least.
        entries: Entries for further classes.

    Raises:
        InputError: A module mixes positions and is not known; the message names it. Or an argument does not fit.
    """
    if axis != "rows":
        raise InputError(f"axis must be 'rows', got {axis!r}")
    if isinstance(group, LocalGroup):
        raise InputError("a LocalGroup runs inside of terrazzo.spatial.tiled: call tiled(model, rows=...)")
    ranks = as_group(group)
    stride = largest_stride(model) if stride is None else stride
    replace(model, False, entries)
    inner = vars(model).get("forward")
    model.forward = Whole(model, None if isinstance(inner, Whole) else inner, ranks, stride)
    return model
