"""States beside a map: an object that one forward pass makes, and that the stem and blocks change in place."""

import inspect
from typing import Any

import torch
from timm.models._manipulate import checkpoint
from torch import nn

from terrazzo.errors import InputError


class Beside:
    """Base of states. A subclass declares its attributes by annotations with defaults.

    It is not a dataclass: sharding looks for tensors in dataclasses, and gives a block a copy, so changes are lost.
    """

    names: tuple[str, ...] = ()

    def __init_subclass__(cls):
        cls.names = (*cls.names, *inspect.get_annotations(cls))

    def __init__(self, **values: Any):
        for name in self.names:
            setattr(self, name, values[name] if name in values else getattr(type(self), name))

    def become(self, other: "Beside") -> None:
        """Make this state equal to another state of its class."""
        for name in self.names:
            setattr(self, name, getattr(other, name))

    def copy(self) -> "Beside":
        """A shallow copy: changing attributes of one state does not change the other."""
        return type(self)(**{name: getattr(self, name) for name in self.names})


class Grid(Beside):
    """The state beside tokens: rows and columns of the patches."""

    grid: tuple[int, int] = (0, 0)


def run(block: nn.Module, x: torch.Tensor, state: Any, again: bool = False) -> torch.Tensor:
    """Run a block on a map and on the state beside it.

    Args:
        state: A `Beside`, which the block may change, or None.
        again: Checkpoint: keep no activations; the backward pass runs the block again. Both runs must begin from the
            same state, so each changes a copy.
    """
    if not again:
        return block(x, state)
    if state is None:
        return checkpoint(block, x)

    def apart(x: torch.Tensor, entered: Beside) -> tuple[torch.Tensor, Beside]:
        own = entered.copy()
        return block(x, own), own

    x, left = checkpoint(apart, x, state.copy())
    state.become(left)
    return x


def needed(state: Any, block: nn.Module) -> Any:
    """The state of a block that cannot run without it.

    Raises:
        InputError: `state` is None.
    """
    if state is None:
        name = type(block).__name__
        raise InputError(f"{name} needs the state beside its input: call it as block(x, state) with model.begin(image)")
    return state
