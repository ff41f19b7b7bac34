"""Linear-InfSA: every token receives the same mean of values, weighted by how central tokens are.

Paper: Self-Attention And Beyond the Infinite: Towards Linear Transformers with Infinite Self-Attention, 2026, arXiv
2603.00175. Official code: github.com/giorgioroffo/infinite-self-attention (MIT).
"""

import torch
from torch import nn

from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._infsa import EPS, InfiniteAttention
from terrazzo.backbones.mixers._local import depthwise
from terrazzo.backbones.mixers._mixer import Host
from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast


class LinearInfSA(InfiniteAttention):
    """out_i = sum_j a_j v_j, a = rho u / (sum u + 1e-6), u_j = relu(m . k_j), m the mean of queries weighted by norms.

    The result is the same for all tokens: they differ by the residual stream alone. With `local`, a depthwise 3x3
    convolution of the patches' values is added. Queries and keys are divided by sqrt(D) each, as in the official code,
    which matters for 1e-6 only. If u is 0 everywhere, the result is 0. The cost is linear in N, and no tensor has more
    than N D numbers a head. The order of tokens does not matter (without `local`). A merged token counts as often as
    the patches that it stands for. All sums are in float32 at least.

    Against the official code: rho is trained, and `local` is not there.

    Source: arXiv 2603.00175, Linear-InfSA.
    """

    def __init__(
        self,
        host: Host,
        rho: float = 0.95,
        rho_trainable: bool = True,
        local: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Args:
        rho: The sum of a token's weights at the start, between 0 and 1.
        rho_trainable: Whether training changes rho. The official code never does.
        local: Whether to add a convolution, which needs a grid.
        """
        super().__init__(host, rho, rho_trainable, device, dtype)
        self.dwc = None
        if local:
            channels = host.heads * host.head_dim
            self.dwc = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, device=device, dtype=dtype)
            self.needs_grid = True

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        dtype = accumulator(query, key, value)
        size = None if place.size is None else place.size[:, None, :, None].to(dtype)
        with without_autocast(value):
            wide = value.to(dtype)
            weights = central(query.to(dtype), key.to(dtype), size) * self.rho(dtype)
            out = (weights.transpose(2, 3) @ wide).expand_as(wide)
            if self.dwc is not None:
                out = out + depthwise(wide, place, self.dwc.weight, self.dwc.bias)
        return out.to(value.dtype)

    def weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        size = None if place.size is None else place.size[:, None, :, None].to(query.dtype)
        found = central(query, key, size) * self.rho(query.dtype)
        return found.transpose(2, 3).expand(-1, -1, query.shape[2], -1)


def central(query: torch.Tensor, key: torch.Tensor, size: torch.Tensor | None = None) -> torch.Tensor:
    """How central tokens are, (B, heads, N, 1), with sum 1, or 0 if no key agrees with the mean query.

    Args:
        size: (B, 1, N, 1), how often tokens count; None for once each.
    """
    total, energy = focus(query, size)
    agreement = agreements(key, total / (energy + EPS), size)
    return agreement / (agreement.sum(2, keepdim=True) + EPS)


def focus(query: torch.Tensor, size: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of queries weighted by their norms (B, heads, 1, D), and the sum of the norms (B, heads, 1, 1).

    The mean query of many tokens is the quotient of these sums over parts of the tokens.
    """
    query = query * query.shape[-1] ** -0.5
    energy = torch.linalg.vector_norm(query, dim=-1, keepdim=True)
    energy = energy if size is None else energy * size
    return energy.transpose(2, 3) @ query, energy.sum(2, keepdim=True)


def agreements(key: torch.Tensor, mean: torch.Tensor, size: torch.Tensor | None = None) -> torch.Tensor:
    """How much keys agree with the mean query (B, heads, 1, D): at least 0, (B, heads, N, 1)."""
    found = (key * key.shape[-1] ** -0.5 @ mean.transpose(2, 3)).relu()
    return found if size is None else found * size
