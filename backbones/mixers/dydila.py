"""DyDiLA: linear attention whose projections, exponents and differences are chosen token by token.

Paper: Dynamic Differential Linear Attention: Enhancing Linear Diffusion Transformer for High-Quality Image Generation,
2026, arXiv 2601.13683. No official code was published: where the paper is silent, the definition is ours.
"""

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._local import depthwise
from terrazzo.backbones.mixers._mixer import Host, Mixer
from terrazzo.errors import InputError
from terrazzo.kernels.dispatch import arguments
from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast

NORMS = ("mean", "none", "abs")
START = 1.854587  # 1 + softplus(START) = 3


class DyDiLA(Mixer):
    """out = Q (K^T v) / N + convolution of v, with Q = f(q) - l f(q'), K = f(k) - l' f(k').

    q, k and v are the host's. q' and k' are the host's input times one of `n_proj` matrices, which a router chooses for
    each token. f(z) = r^g |r| / |r^g| with r = relu(z): the norm of r, with other proportions. The exponent g is one of
    `n_kernel` learned numbers of at least 1, and l one of `n_diff` learned numbers, for each token and head. All
    choices are the largest of a softmax, whose gradient reaches the routers (straight-through). The convolution is
    depthwise, 3x3, of the values of the patches. Q and K may be negative, so no sum of weights could serve as a
    normaliser.

    The matrices begin at random, and queries and keys from them have neither the host's norms nor its rotary positions.
    They cost more than the rest: 2 n_proj C^2 numbers and as many products a token. The cost is linear in N. Sums over
    tokens are in float32 at least.

    Source: arXiv 2601.13683. Ours: what normalises, what heads share, biases, the gradient of choices.
    """

    def __init__(
        self,
        host: Host,
        n_proj: int = 3,
        n_kernel: int = 9,
        n_diff: int = 9,
        positive: str = "relu",
        norm: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Args:
        n_proj, n_kernel, n_diff: Numbers of matrices, of exponents and of factors of differences.
        positive: "relu" or "softplus", which makes r of z.
        norm: "mean" divides by N; "none" by sqrt(D) only; "abs" by
            the absolute values of Q times the sum of the absolute values of K.
        """
        super().__init__(host)
        counts = {"n_proj": n_proj, "n_kernel": n_kernel, "n_diff": n_diff}
        for name, count in counts.items():
            arguments.whole(count, name, 1)
        if positive not in ("relu", "softplus"):
            raise InputError(f"positive must be 'relu' or 'softplus', got {positive!r}")
        if norm not in NORMS:
            raise InputError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        self.positive, self.norm = positive, norm
        factory, channels = dict(device=device, dtype=dtype), host.heads * host.head_dim
        self.q_bank, self.k_bank = (Bank(n_proj, host.dim, channels, **factory) for _ in range(2))
        self.q_router, self.k_router = (Router(host.dim, n_proj, **factory) for _ in range(2))
        self.kernel = nn.ModuleDict(
            {part: Kernel(host.head_dim, n_kernel, **factory) for part in ("q", "k", "qp", "kp")}
        )
        self.diff = Difference(host.head_dim, n_diff, **factory)
        self.dwc = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, **factory)

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        query, key = self._features(query, key, value, place)
        with without_autocast(value):
            wide = value.to(query.dtype)
            out = query @ (key.transpose(2, 3) @ wide)
            if self.norm == "mean":
                out = out / value.shape[2]
            elif self.norm == "none":
                out = out * value.shape[3] ** -0.5
            else:
                out = out / (query.abs() @ key.abs().sum(2).unsqueeze(3)).clamp(min=1e-8)
            return (out + depthwise(wide, place, self.dwc.weight, self.dwc.bias)).to(value.dtype)

    def weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        query, key = self._features(query, key, value, place)
        found = query @ key.transpose(2, 3)
        if self.norm == "mean":
            return found / key.shape[2]
        if self.norm == "none":
            return found * key.shape[3] ** -0.5
        return found / (query.abs() @ key.abs().sum(2).unsqueeze(3)).clamp(min=1e-8)

    def _features(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Q and K, in float32 at least."""
        dtype = accumulator(query, key, value)
        with without_autocast(value):
            chosen = [router(place.x.to(dtype)) for router in (self.q_router, self.k_router)]
        banks = (self.q_bank(place.x, chosen[0]), self.k_bank(place.x, chosen[1]))
        other_query, other_key = (x.unflatten(2, (self.host.heads, -1)).transpose(1, 2) for x in banks)
        with without_autocast(value):
            streams = {"q": query, "k": key, "qp": other_query, "kp": other_key}
            made = {part: self.kernel[part](x.to(dtype), self.positive) for part, x in streams.items()}
            return self.diff(made["q"], made["qp"], self.diff.q_router), self.diff(
                made["k"], made["kp"], self.diff.k_router
            )


class Router(nn.Linear):
    """Chooses one of n things: (..., C) to weights (..., n), 1 for the largest score and 0 for the others.

    The gradient is that of the softmax of the scores.
    """

    def __init__(self, channels: int, count: int, **factory):
        super().__init__(channels, count, bias=False, **factory)
        nn.init.xavier_uniform_(self.weight)  # never 0: all tokens would choose the same

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        soft = F.linear(x, self.weight.to(x.dtype)).softmax(-1)
        hard = torch.arange(soft.shape[-1], device=x.device) == soft.argmax(-1, keepdim=True)
        return hard.to(soft.dtype) + (soft - soft.detach())


class Bank(nn.Module):
    """Matrices of which each token uses one: (B, N, C) and weights (B, N, n) to (B, N, C').

    All products are computed, because the gradient of the choice needs them.
    """

    def __init__(self, count: int, channels: int, out_channels: int, **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, out_channels, channels, **factory))
        with torch.no_grad():
            for matrix in self.weight:
                nn.init.xavier_uniform_(matrix)

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        every = F.linear(x, self.weight.flatten(0, 1)).unflatten(2, self.weight.shape[:2])
        return (every * weights.unsqueeze(3)).sum(2)


class Kernel(nn.Module):
    """f(z) = r^g |r| / |r^g| for each token and head (..., D), computed with logarithms so that r^g cannot overflow."""

    def __init__(self, head_dim: int, count: int, **factory):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((count,), START, **factory))
        self.router = Router(head_dim, count, **factory)

    def forward(self, z: torch.Tensor, positive: str) -> torch.Tensor:
        power = self.router(z.detach()) @ (1 + F.softplus(self.gamma.to(z.dtype)))
        x = z.relu() if positive == "relu" else F.softplus(z)
        alive = x > 0
        some = alive.any(-1, keepdim=True)  # if nothing is positive, the result is 0, without a gradient
        peak = torch.where(some, x.detach().amax(-1, keepdim=True), 1)
        logs = torch.where(alive, x / peak, 1).log()
        powers = torch.where(alive, (power.unsqueeze(-1) * logs).exp(), 0)
        lengths = (torch.linalg.vector_norm(y, dim=-1, keepdim=True) for y in (x, powers))
        length, length_of_powers = (torch.where(some, y, 1) for y in lengths)
        return torch.where(some, length * powers / length_of_powers, 0)


class Difference(nn.Module):
    """z - l z' for each token and head (..., D), with l from a bank that queries and keys share."""

    def __init__(self, head_dim: int, count: int, **factory):
        super().__init__()
        self.lambda_bank = nn.Parameter(torch.full((count,), 0.01, **factory))
        self.q_router, self.k_router = (Router(2 * head_dim, count, **factory) for _ in range(2))

    def forward(self, z: torch.Tensor, other: torch.Tensor, router: Router) -> torch.Tensor:
        chosen = router(torch.cat([z, other], -1).detach()) @ self.lambda_bank.to(z.dtype)
        return z - chosen.unsqueeze(-1) * other
