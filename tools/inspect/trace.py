"""One forward pass of a model, operation by operation, counted without computing anything.

It runs on the meta device: shapes flow, numbers do not. Operators of terrazzo run as their opaque op, whatever backend
is requested: the shapes alone decide the counts. Dense attention runs as its two products and a softmax, not fused.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from terrazzo.backbones._modes import evaluating
from terrazzo.errors import InputError, first_line
from terrazzo.kernels import use_backend

# PyTorch counts in 64 bits; no sum over the pixels of images up to this size comes near the limit.
_LONGEST = 2**24


@dataclass(frozen=True)
class Operation:
    """One operation that moves data; a view does not count.

    Attributes:
        layer: name of the innermost module that ran it, as in `named_modules`; empty for the model itself.
        kind: class of that module.
        function: the operation; `args` and `kwargs`, on the meta device, are its arguments.
        flops: two for each multiply-add, 0 where `torch.utils.flop_counter` has no formula.
        activations: output elements of an operation that has a FLOP formula, else 0.
        read: bytes of its input tensors, each once.
        written: bytes of its output tensors, each once.
    """

    layer: str
    kind: str
    function: torch._ops.OpOverload
    args: Sequence[object]
    kwargs: Mapping[str, object]
    flops: int
    activations: int
    read: int
    written: int


def image_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """The (height, width) that `size` means: a single number is a square. InputError if no image can have it."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1 or max(pair) > _LONGEST:
        limits = f"of at least 1 and at most {_LONGEST}"
        raise InputError(f"the image size is {size}; it must be one or two numbers {limits}, height first")
    return pair


@contextlib.contextmanager
def taking(name: str, size: tuple[int, int]) -> Iterator[None]:
    """Turn the error that model `name` raises at a wrong image size (H, W) into an InputError of one line."""
    try:
        yield
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(f"{name} cannot take {size[0]}x{size[1]} images: {first_line(error)}") from error


def meta_outputs(model: nn.Module, size: int | tuple[int, int], in_chans: int = 3, batch: int = 1):
    """The outputs of `model` for images of one size, as meta tensors: right shapes, no numbers.

    The model itself is not touched, on whichever device its parameters lie; its mode is what the caller left it in.

    Args:
        model: takes one tensor (batch, in_chans, H, W).
        size: H and W, or one number for a square.
        in_chans: channels of the image.
        batch: number of images.
    """
    height, width = image_size(size)
    state = {name: t.to("meta") for named in (model.named_parameters(), model.named_buffers()) for name, t in named}
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    image = torch.empty(batch, in_chans, height, width, dtype=dtype, device="meta")
    # Only the portable form runs on every device, including meta, and as one operation.
    with torch.no_grad(), use_backend("portable"):
        return torch.func.functional_call(model, state, (image,))


def trace(model: nn.Module, size: int | tuple[int, int], in_chans: int = 3, batch: int = 1) -> list[Operation]:
    """The operations of one forward pass in evaluation mode, in order.

    Args:
        model: takes one tensor (batch, in_chans, H, W); on any device, the meta device included.
        size: H and W, or one number for a square.
        in_chans: channels of the image.
        batch: number of images.

    Raises:
        InputError: there can be no image of that size.
    """
    with (
        evaluating(model),
        _layers(model) as layers,
        FlopCounterMode(display=False) as flops,
        _Recorder(layers, flops) as recorder,
    ):
        meta_outputs(model, size, in_chans, batch)
    return recorder.operations


@contextlib.contextmanager
def _layers(model: nn.Module) -> Iterator[list[tuple[str, str]]]:
    """Name and class of the modules that are running inside the `with` block, innermost last."""
    running = []
    names = {module: (name, type(module).__name__) for name, module in model.named_modules()}
    call = nn.Module.__call__

    def named(module: nn.Module, *args: object, **kwargs: object) -> object:
        if module not in names:
            return call(module, *args, **kwargs)
        running.append(names[module])
        try:
            return call(module, *args, **kwargs)
        finally:
            running.pop()

    # No hooks: a hook can raise a layer's cost (`terrazzo.backbones._bare`), and the cost is what we measure.
    with mock.patch.object(nn.Module, "__call__", named):
        yield running


class _Recorder(TorchDispatchMode):
    """Keeps every operation that moves data, with the count of `flops`, the mode around this one."""

    def __init__(self, layers: Sequence[tuple[str, str]], flops: FlopCounterMode):
        super().__init__()
        self.layers = layers
        self.flops = flops
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = self.flops.get_total_flops()
        out = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        if not func._schema.is_mutable:
            # Views are found by their memory and not by the schema: _unsafe_view's schema does not say that it is a
            # view.
            owned = {x.untyped_storage()._cdata for x in inputs}
            outputs = [x for x in outputs if x.untyped_storage()._cdata not in owned]
        if outputs and self.layers:  # operations outside all modules only prepare the pass
            layer, kind = self.layers[-1]
            counted = func._overloadpacket in flop_registry
            self.operations.append(
                Operation(
                    layer=layer,
                    kind=kind,
                    function=func,
                    args=args,
                    kwargs=kwargs,
                    flops=self.flops.get_total_flops() - before,
                    activations=outputs[0].numel() if counted else 0,
                    read=_bytes(inputs),
                    written=_bytes(outputs),
                )
            )
        return out


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes in memory: a repeated tensor and an expanded axis count once."""
    distinct = {id(x): x for x in tensors}.values()
    return sum(
        x.element_size() * math.prod(size for size, stride in zip(x.shape, x.stride()) if stride) for x in distinct
    )
