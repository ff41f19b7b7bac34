"""PyTorch's modules that work on single positions, or only call others."""

import torch
from torch import nn

from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._operators import own
from terrazzo.spatial._part import Part


def _check_flatten(module: nn.Flatten) -> str | None:
    return None if module.start_dim == 1 and module.end_dim == -1 else "may join rows and columns"


def _drop(part: Part, module: nn.Dropout, x: torch.Tensor) -> torch.Tensor:
    """Dropout with a generator for each rank: ranks with more rows draw more numbers, and the global generators must
    stay equal.

    All ranks have the tokens in front and pooled features, and drop the same numbers of them.
    """
    if not module.training or module.p in (0, 1):
        return own(module, x)
    seed = int(torch.randint(2**31, ()))
    if x.dim() == 2 or (1, 1) in (x.shape[2:], x.shape[1:3]):
        return _dropped(x, module.p, seed)
    front, rows = x.tensor_split([part.prefix if x.dim() == 3 else 0], 1)
    rows = _dropped(rows, module.p, seed + 1 + part.rank)
    return torch.cat([_dropped(front, module.p, seed), rows], 1) if front.shape[1] else rows


def _dropped(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    generator = torch.Generator(x.device).manual_seed(seed)
    return x * torch.empty_like(x).bernoulli_(1 - p, generator=generator).div_(1 - p)


_ACTIVATIONS = (
    "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU ReLU ReLU6 SELU SiLU "
    "Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink Threshold"
)

ENTRIES = {
    **dict.fromkeys(_ACTIVATIONS.split(), OWN),
    **dict.fromkeys(("Sequential", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict"), OWN),
    **dict.fromkeys(("Identity", "Linear", "Dropout2d"), OWN),
    "Dropout": Entry(_drop),
    # After a pooling there are no positions. A map that is flattened fails in the layer behind, by its channels.
    "Flatten": Entry(check=_check_flatten),
}
