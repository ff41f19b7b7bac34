"""Memory that student and teacher share, and a teacher that is not a part of the model."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Aside(nn.Module):
    """Holds a frozen model in evaluation mode that is a part of no other model.

    A module in an `Aside` is not saved, not trained, not wrapped for several processes and not copied with the model
    that uses it. Whoever holds an `Aside` moves it to other devices by `move`.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.held = (model.eval().requires_grad_(False),)

    @property
    def model(self) -> Any:
        """The model."""
        return self.held[0]

    def _apply(self, fn: Callable, recurse: bool = True) -> "Aside":
        """As for any module: moves the held model, too, when the model that uses it moves."""
        super()._apply(fn, recurse)
        self.model._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> "Aside":
        """Changes nothing: the model stays in evaluation mode."""
        return self

    def __deepcopy__(self, memo: dict) -> "Aside":
        """The same object, so that a moving average of the weights does not copy the teacher."""
        return self


def share(teacher: nn.Module, student: nn.Module) -> int:
    """Let a teacher use the student's memory for tensors that both have and that the student does not train.

    Args:
        teacher: A frozen model.
        student: A model of the same kind; its trained parameters require gradients.

    Returns:
        How many numbers are in common.
    """
    count = 0
    for _, key, own, theirs in _places(teacher, student):
        if _same(own[key], theirs.get(key)):
            own[key] = theirs[key]
            count += own[key].numel()
    return count


def unshare(teacher: nn.Module, student: nn.Module, state: Mapping[str, Tensor], prefix: str) -> int:
    """Give a teacher its own copy of shared tensors that a state dict is about to change.

    Args:
        teacher, student: See `share`.
        state: The weights that the student will get.
        prefix: What stands in front of the student's names in `state`.

    Returns:
        How many tensors the teacher got.
    """
    count = 0
    for name, key, own, theirs in _places(teacher, student):
        value, loaded = own[key], state.get(prefix + name)
        if value is None or value is not theirs.get(key) or loaded is None or loaded.shape != value.shape:
            continue
        if not torch.equal(loaded.to(value), value):
            copied = value.detach().clone()
            own[key] = nn.Parameter(copied, requires_grad=False) if isinstance(value, nn.Parameter) else copied
            count += 1
    return count


def _places(teacher: nn.Module, student: nn.Module) -> Iterator[tuple[str, str, dict, dict]]:
    """The teacher's tensors in modules that both have: the whole name, the key, and both modules' dicts of tensors."""
    others = dict(student.named_modules())
    for name, module in teacher.named_modules():
        if (other := others.get(name)) is None:
            continue
        for own, theirs in ((module._parameters, other._parameters), (module._buffers, other._buffers)):
            for key in own:
                yield f"{name}.{key}" if name else key, key, own, theirs


def _same(value: Tensor | None, other: Tensor | None) -> bool:
    return value is not None and other is not None and not other.requires_grad and value.shape == other.shape
