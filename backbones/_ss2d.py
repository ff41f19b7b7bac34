"""SS2D: the mixer of VMamba and MedMamba, four selective scans over a map in four orders."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.backbones._layers import WideLayerNorm, initial_step_bias, on_maps
from terrazzo.backbones._weights import take_old_names
from terrazzo.kernels import selective_scan_2d

__all__ = ["SS2D"]

_SCANS = 4


class SS2D(nn.Module):
    """The cross-scan on (B, H, W, C): scans by rows, by columns, and both reversed, summed.

    Projections act on single pixels, so all are computed once, in the order of the image; only the scans reorder.

    Source: VMamba, arXiv 2401.10166, section 4.2; names as in the authors' code, but for `proj_out`.
    Without a gate it is their "v05_noz".
    """

    no_decay = ("A_logs", "Ds", "dt_projs_bias")

    def __init__(self, dim: int, ratio: float, states: int, gated: bool, **factory):
        """Args:
        dim: Channels of the map.
        ratio: Scanned channels per channel of the map.
        states: Numbers of state per scanned channel.
        gated: The first version: a gate beside the scans, and a bias in the convolution.
        """
        super().__init__()
        inner, rank = int(ratio * dim), math.ceil(dim / 16)
        self.gated = gated
        self.sizes = (rank, states, states)
        self.in_proj = nn.Linear(dim, 2 * inner if gated else inner, bias=False, **factory)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=gated, **factory)
        bound = inner**-0.5  # as in a linear layer
        self.x_proj_weight = nn.Parameter(
            torch.empty(_SCANS, sum(self.sizes), inner, **factory).uniform_(-bound, bound)
        )
        bound = rank**-0.5
        self.dt_projs_weight = nn.Parameter(torch.empty(_SCANS, inner, rank, **factory).uniform_(-bound, bound))
        self.dt_projs_bias = nn.Parameter(initial_step_bias(_SCANS, inner, **factory))
        decays = torch.arange(1, states + 1, **factory).log()
        self.A_logs = nn.Parameter(decays.repeat(_SCANS * inner, 1))
        self.Ds = nn.Parameter(torch.ones(_SCANS * inner, **factory))
        self.out_norm = WideLayerNorm(inner, **factory)
        self.proj_out = nn.Linear(inner, dim, bias=False, **factory)
        self.register_load_state_dict_pre_hook(take_old_names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, gate = self.entered(x)
        return self.left(self.scan(x), gate, x.dtype)

    def entered(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The map that is scanned, (B, H, W, D), and the gate beside the scans or None."""
        x, gate = self.in_proj(x), None
        if self.gated:
            x, gate = x.chunk(2, -1)
        return F.silu(on_maps(x, self.conv2d)), gate

    def left(self, y: torch.Tensor, gate: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The output (B, H, W, C) from the sum of the scans."""
        # The sum of the scans may leave the range of half precision, so the norm takes it in float32.
        y = self.out_norm(y).to(dtype)
        return self.proj_out(y if gate is None else y * F.silu(gate))

    def scan(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the four scans of (B, H, W, D), in float32 at least."""
        return selective_scan_2d(*self.scan_inputs(x), delta_softplus=True)

    def scan_inputs(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The arguments of the scans, from u to the bias of delta; each pixel's are computed from this pixel."""
        inputs = F.linear(x, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (_SCANS, -1))
        steps, B, C = inputs.split(self.sizes, -1)  # B H W K R, B H W K N twice
        steps = steps.flatten(0, 2).transpose(0, 1) @ self.dt_projs_weight.transpose(1, 2)  # K BHW D
        decays = -torch.exp(self.A_logs.to(torch.promote_types(self.A_logs.dtype, torch.float32)))
        return (
            x,
            steps.transpose(0, 1).unflatten(0, x.shape[:3]),
            decays.unflatten(0, (_SCANS, -1)),
            B,
            C,
            self.Ds.unflatten(0, (_SCANS, -1)),
            self.dt_projs_bias,
        )
