"""What flows beside a map: an object that one forward pass makes, and that stem and blocks change in place."""

from dataclasses import fields, replace
from typing import Any

import torch
from timm.models._manipulate import checkpoint
from torch import nn

from terrazzo.errors import InputError


def run(block: nn.Module, x: torch.Tensor, state: Any, again: bool = False) -> torch.Tensor:
    """What a block makes of a map and of the state beside it.

    Args:
        state: A dataclass, which the block may change, or None.
        again: Keep nothing for the backward pass, which runs the block once more. Both runs must begin from one state,
            so each changes a copy.
    """
    if not again:
        return block(x, state)
    if state is None:
        return checkpoint(block, x)

    def apart(x: torch.Tensor, entered: Any) -> tuple[torch.Tensor, Any]:
        own = replace(entered)
        return block(x, own), own

    x, left = checkpoint(apart, x, replace(state))
    become(state, left)
    return x


def become(state: Any, other: Any) -> None:
    """Make a state equal to another one of its class."""
    for field in fields(state):
        setattr(state, field.name, getattr(other, field.name))


def needed(state: Any, block: nn.Module) -> Any:
    """The state, without which a block cannot run.

    Raises:
        InputError: There is none.
    """
    if state is None:
        name = type(block).__name__
        raise InputError(f"{name} needs the state beside its input: call it as block(x, state) with model.begin(image)")
    return state
