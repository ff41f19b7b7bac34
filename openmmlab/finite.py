"""A loss that is not finite ends the training before it spoils the weights, and the message names its origin."""

from collections.abc import Iterator
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from terrazzo.errors import NonFiniteError
from terrazzo.openmmlab.seeding import seed_iteration

SHOWN = 4
"""How many pictures of a batch are named."""


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stops at the first loss that is NaN or infinite: the weights are not updated, and no checkpoint is written.

    The batch is then run again with the same randomness, to find the first layer whose output is not finite.
    """

    priority = "VERY_LOW"

    def before_train(self, runner: Runner) -> None:
        """Puts the check between the loss and its gradient."""
        self.batch = None
        if not isinstance(runner.optim_wrapper, OptimWrapper):
            return  # several optimizers: the model calls them itself, with its own losses
        update = runner.optim_wrapper.update_params

        def checked(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            if not torch.isfinite(loss).all():
                raise NonFiniteError(
                    f"the loss is {float(loss.detach().mean())} at iteration {runner.iter + 1}: "
                    f"{self._origin(runner)}{pictures_of(self.batch)}; the weights were not updated. Lower the "
                    "learning rate, clip gradients, or look at that batch; --resume goes on from the last checkpoint"
                )
            update(loss, *args, **kwargs)

        runner.optim_wrapper.update_params = checked

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Remembers the batch."""
        self.batch = data_batch

    def after_train(self, runner: Runner) -> None:
        """Removes the check."""
        self.batch = None
        vars(runner.optim_wrapper).pop("update_params", None)

    def _origin(self, runner: Runner) -> str:
        """Where the first value that is not finite comes from."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        # Running means are left out: this batch has already spoilt the means after the origin.
        spoilt = [name for name, value in model.named_parameters() if not _finite(value)]
        if spoilt:
            return f"{len(spoilt)} of the model's weights were already not finite, the first is {spoilt[0]}"
        seed_iteration(runner)
        with torch.no_grad(), runner.optim_wrapper.optim_context(model):
            return first_non_finite(model, self.batch)


def first_non_finite(model: nn.Module, batch: Any) -> str:
    """Runs a batch through an mmengine model and says where the first value that is not finite appears.

    Args:
        model: an mmengine `BaseModel`.
        batch: a batch from the data loader.

    Returns:
        A clause that names the input, the first layer, or the terms of the loss.
    """
    data = model.data_preprocessor(batch, True)
    if not _finite(data):
        return "the batch itself holds values that are not finite"
    names = {module: name for name, module in model.named_modules()}
    found: list[str] = []

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        # A module ends before its parent, so the first module that is found is the innermost.
        if not found and not _finite(output):
            found.append(f"layer {names[module] or 'model'} ({type(module).__name__})")

    handles = [module.register_forward_hook(look) for module in names]
    try:
        losses = model._run_forward(data, mode="loss")
    finally:
        for handle in handles:
            handle.remove()
    terms = [name for name, value in losses.items() if not _finite(value)] if isinstance(losses, dict) else []
    if found and found[0] != "layer model":
        return f"first produced by {found[0]}" + (f", seen in {', '.join(terms)}" if terms else "")
    if terms:
        return f"every layer's output is finite, and {', '.join(terms)} is not"
    return "the same batch gave finite values when it was run again"


def pictures_of(batch: Any) -> str:
    """A clause that names the files of the pictures in a batch; empty if the batch does not have them."""
    names = list(dict.fromkeys(_paths(batch)))
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"; the batch holds {', '.join(names[:SHOWN])}{more}"


def _paths(value: Any) -> Iterator[str]:
    """The `img_path` of the samples in a batch, in its order."""
    if isinstance(value, BaseDataElement):
        value = {"img_path": value.metainfo.get("img_path")}
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "img_path":
                yield from [str(path) for path in (item if isinstance(item, (list, tuple)) else [item]) if path]
            else:
                yield from _paths(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _paths(item)


def _finite(value: Any) -> bool:
    return all(torch.isfinite(tensor).all() for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating point tensors in nested containers."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
