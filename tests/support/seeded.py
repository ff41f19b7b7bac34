"""Models and images that are the same in every run."""

import copy
import functools

import timm
import torch

import terrazzo  # noqa: F401
from terrazzo.backbones._weights import _Uninitialised


def build(name: str, **kwargs) -> torch.nn.Module:
    """The model with fixed weights; no weight has a value that could hide a mistake."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def bare(name: str, **kwargs) -> torch.nn.Module:
    """A model for weights that a test loads: its own are not drawn, which takes longer than many tests."""
    with _Uninitialised():
        return timm.create_model(name, **kwargs).eval()


@functools.lru_cache(maxsize=3)
def _kept(name: str) -> torch.nn.Module:
    return build(name)


def whole(name: str) -> torch.nn.Module:
    """`build(name)`, as a copy: a family's tests take the same models many times, and weights take long to draw."""
    return copy.deepcopy(_kept(name))


def image(size: tuple[int, int], batch: int = 1, chans: int = 3) -> torch.Tensor:
    return torch.randn(batch, chans, *size, generator=torch.Generator().manual_seed(1))
