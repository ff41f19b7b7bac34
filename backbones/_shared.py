"""Copies of a model that share its weights, so that many variants need the memory of one."""

import copy

from torch import nn


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of a model, or of a part of one, that shares its parameters and buffers."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
