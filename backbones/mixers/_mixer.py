"""The base of all mixers."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.backbones._place import Place
from terrazzo.errors import InputError
from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast
from terrazzo.kernels.dispatch.exporting import is_exporting, is_open


class Host(NamedTuple):
    """The attention layer that a mixer serves.

    Attributes:
        dim: Channels of the layer's input.
        heads: Query heads; keys and values come with as many.
        head_dim: Channels of a head.
        layer: Index of the layer, from 0.
        depth: Number of layers of the model.
    """

    dim: int
    heads: int
    head_dim: int
    layer: int = 0
    depth: int = 1


class Mixer(nn.Module):
    """Mixes tokens: queries, keys and values (B, heads, N, D) to (B, heads, N, D).

    A subclass implements `mix`, and `dense` if it computes softmax attention on small maps. Its constructor takes the
    `Host`, options by name, `device` and `dtype`.

    Attributes:
        needs_grid: Whether it needs the tokens' positions on a grid, so that no reducer may merge tokens before.
        open_sizes: Whether an export may leave height and width open. Otherwise a choice by the size, such as softmax
            attention on small maps, would silently become constant.
        local: Names of the parameters of a local branch, which a conversion can train after the global branch; empty
            for mixers with one branch.
        name: Its name among `mixers()`.
        options: The options with which it was made.
    """

    needs_grid = True
    open_sizes = True
    local: tuple[str, ...] = ()
    name: str = ""
    options: dict[str, Any]

    def __init__(self, host: Host, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.host = host
        self.options = {}

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        """Mix tokens (B, heads, N, D).

        Raises:
            InputError: The mixer needs a grid, and tokens were merged or reordered; or an export leaves sizes open that
                the mixer needs.
        """
        self._check_grid(place)
        opened = is_exporting() and place.grid is not None and (is_open(place.grid[0]) or is_open(place.grid[1]))
        if opened and not self.open_sizes:
            raise InputError(
                f"mixer {self.name!r} is exported for images of one size, because what it computes depends on the "
                "size: leave height and width fixed"
            )
        if place.grid is not None and self.dense(place.grid, place.prefix) is not None:
            return softmax_attention(query, key, value, place)
        return self.mix(query, key, value, place)

    def _check_grid(self, place: Place) -> None:
        if place.grid is None and self.needs_grid:
            raise InputError(
                f"mixer {self.name!r} needs tokens on a grid, and tokens of layer {self.host.layer} are not"
            )

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        """Mix tokens (B, heads, N, D) by the mechanism itself."""
        raise NotImplementedError

    def dense(self, grid: tuple[int, int], prefix: int) -> str | None:
        """Why the mixer computes softmax attention on this grid; None if it does not."""
        return None

    def matrix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        """The weights (B, heads, N, N) with which tokens sum values, in float32 at least.

        The mixer's output is this matrix times values, up to what acts on values before or after the sum: see
        `weights`.

        Raises:
            InputError: The mixer needs a grid that is not there, or it has no matrix.
        """
        self._check_grid(place)
        if place.grid is not None and self.dense(place.grid, place.prefix) is not None:
            return softmax_matrix(query, key, place)
        dtype = accumulator(query, key, value)
        with without_autocast(value):
            return self.weights(*(x.to(dtype) for x in (query, key, value)), place)

    def weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        """The matrix of the mechanism itself; convolutions of values, and gates of channels, are not part of it."""
        raise InputError(
            f"mixer {self.name!r} has no matrix of weights: train the stage 'hidden', which compares outputs of layers"
        )

    def extra_repr(self) -> str:
        return ", ".join([repr(self.name), *(f"{key}={value!r}" for key, value in self.options.items())])


def softmax_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
    """PyTorch's attention (B, heads, N, D), in which a token counts as often as the patches that it stands for."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=place.mask(query.dtype))


def softmax_matrix(query: torch.Tensor, key: torch.Tensor, place: Place) -> torch.Tensor:
    """The weights of softmax attention (B, heads, N, N), in float32 at least."""
    dtype = accumulator(query, key)
    with without_autocast(query):
        query, key = query.to(dtype) * query.shape[-1] ** -0.5, key.to(dtype)
        logits = query @ key.transpose(2, 3)
        mask = place.mask(dtype)
        return (logits if mask is None else logits + mask).softmax(-1)
