"""Building modules without filling their weights, where only the structure matters."""

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FILLS = {
    *(getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")),
    *(
        getattr(Tensor, name)
        for name in ("normal_", "uniform_", "random_", "fill_", "zero_", "exponential_", "bernoulli_", "erfinv_")
    ),
}
DRAWS = {torch.randn: torch.empty, torch.rand: torch.empty}


class Unfilled(TorchFunctionMode):
    """A context in which tensors are allocated and never written.

    The operating system hands out this memory only when it is touched, so a model of a billion parameters costs neither
    time nor memory. Its numbers are arbitrary: it must not be run.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in FILLS:
            return args[0] if args else kwargs["tensor"]
        if func in DRAWS:
            kwargs.pop("generator", None)
            return DRAWS[func](*args, **kwargs)
        return func(*args, **kwargs)
