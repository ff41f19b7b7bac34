"""Fully sharded data parallelism (Zhao et al. 2023) by PyTorch's `fully_shard`, for models of mmengine's runner.

mmengine's own wrapper uses the first FullyShardedDataParallel. It needs a GPU and another runner, and its checkpoints
fit only that runner. Here a checkpoint holds whole tensors under their usual names: a run can continue with more
processes, with fewer, or with one.

`terrazzo train --fsdp` uses it. Your own config imports this module in `custom_imports` and sets
`runner_type="ShardedRunner"` and `model_wrapper_cfg=dict(type="FullyShardedModel")`.
"""

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.dist import broadcast, is_main_process
from mmengine.optim import OptimWrapper
from mmengine.registry import MODEL_WRAPPERS, RUNNERS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from terrazzo.errors import InputError


@MODEL_WRAPPERS.register_module()
class FullyShardedModel(nn.Module):
    """Shards an mmengine model's parameters, gradients and optimizer states over the processes.

    The blocks of the backbone are gathered one by one, and the rest of the model as a whole: a part is gathered in
    `forward`, and heads may use their weights in other methods.

    Args:
        module: the model, with equal weights in all processes.
        min_parameters: a block with fewer parameters is sharded with its parent.
        dtype: "bfloat16" computes and communicates in that type; None keeps the parameters' type.
    """

    def __init__(self, module: nn.Module, min_parameters: int = 100_000, dtype: str | None = None):
        if not getattr(module, "shardable", True):
            raise InputError(
                f"{type(module).__name__} runs parts of its model by themselves and cannot be divided among processes; "
                "leave --fsdp out, so that each process has a copy"
            )
        super().__init__()
        mesh = init_device_mesh(get_device(), (torch.distributed.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype)) if dtype else MixedPrecisionPolicy()
        lists = (nn.ModuleList, nn.Sequential)
        holders = [part for part in getattr(module, "backbone", module).modules() if isinstance(part, lists)]
        blocks = [child for holder in holders for child in holder.children() if not isinstance(child, lists)]
        for block in reversed(blocks):  # the innermost first: a part is sharded before its parent
            if sum(parameter.numel() for parameter in block.parameters()) >= min_parameters:
                fully_shard(block, mesh=mesh, mp_policy=policy)
        self.module = fully_shard(module, mesh=mesh, mp_policy=policy)
        for part in module.modules():
            part.register_load_state_dict_pre_hook(_shard_incoming)

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict:
        """The model's own."""
        return self.module.train_step(data, optim_wrapper)

    def val_step(self, data: Any) -> list:
        """The model's own."""
        return self.module.val_step(data)

    def test_step(self, data: Any) -> list:
        """The model's own."""
        return self.module.test_step(data)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.module(*args, **kwargs)


@RUNNERS.register_module()
class ShardedRunner(Runner):
    """mmengine's Runner for a `FullyShardedModel`: it initialises before it shards, and gathers before it saves."""

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Initialises and shards the model."""
        if isinstance(model, FullyShardedModel):
            return model
        if not self.distributed:
            raise InputError(
                "sharding divides a model among processes, and there is only one process; add --launcher pytorch"
            )
        model = model.to(get_device())
        if hasattr(model, "init_weights"):
            model.init_weights()
        for value in model.state_dict().values():
            broadcast(value)
        arguments = {key: value for key, value in (model_wrapper_cfg or {}).items() if key != "type"}
        return FullyShardedModel(model, **arguments)

    def _init_model_weights(self) -> None:
        """Does nothing: `wrap_model` did it while the tensors were whole."""

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """As in mmengine, with an optimizer that shards the states that it loads."""
        fresh = not isinstance(optim_wrapper, OptimWrapper)
        built = super().build_optim_wrapper(optim_wrapper)
        if fresh:
            built.optimizer.register_load_state_dict_pre_hook(_shard_states)
        return built

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Gathers whole tensors from all processes, and lets the first process write them."""
        optimizer = self.optim_wrapper.optimizer
        weights, states = _whole(self.model.module.state_dict()), _whole(optimizer.state_dict())
        weights = collections.OrderedDict(weights)  # mmengine stores versions on it
        with _answering(self.model.module, weights), _answering(optimizer, states):
            super().save_checkpoint(*args, **kwargs)


def shard_config(cfg: Config) -> None:
    """Makes a config train sharded, in place."""
    cfg.runner_type = "ShardedRunner"
    cfg.model_wrapper_cfg = ConfigDict(type="FullyShardedModel")


def _whole(value: Any) -> Any:
    """Nested containers with whole tensors, on the first process' CPU, in place of sharded tensors."""
    if isinstance(value, DTensor):
        tensor = value.detach().full_tensor()
        return tensor.cpu() if is_main_process() else None
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_whole(item) for item in value)
    return value


@contextlib.contextmanager
def _answering(holder: Any, state: dict) -> Iterator[None]:
    """Makes `holder.state_dict()` return the gathered state."""
    holder.__dict__["state_dict"] = lambda *args, **kwargs: state
    try:
        yield
    finally:
        del holder.__dict__["state_dict"]


def _like(tensor: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, sharded like the target."""
    if not isinstance(target, DTensor) or isinstance(tensor, DTensor) or tensor.shape != target.shape:
        return tensor
    return distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)


def _shard_incoming(module: nn.Module, state: dict, prefix: str, *args: Any) -> None:
    """Shards the tensors that are loaded into one module."""
    for name, parameter in module.named_parameters(recurse=False):
        if prefix + name in state:
            state[prefix + name] = _like(state[prefix + name], parameter)


def _shard_states(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """Shards the states that an optimizer loads like its parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        key: {name: _like(value, parameters[key]) if torch.is_tensor(value) else value for name, value in entry.items()}
        for key, entry in state["state"].items()
    }
    return {**state, "state": states}
