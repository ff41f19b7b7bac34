"""MATE's global branch: Mamba-2's scan in both directions, with queries, keys and values of the host.

See `terrazzo.backbones.mixers.ssd`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._mixer import Host, Mixer
from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast
from terrazzo.kernels.ssd import ssd

TAPS = 4  # of the convolution along the sequence
OPEN = 1.2784645  # where silu is 1
MEMORY = -4.0  # a step keeps sigmoid(4) = 0.982 of the state
CELL = 8  # side of the patches that a review token averages
LONG = 1024  # patches from which there are review tokens


class Direction(nn.Module):
    """What a direction of the scan has for itself: a convolution that begins as the identity, a step, a skip."""

    def __init__(self, host: Host, **factory):
        super().__init__()
        channels = 3 * host.heads * host.head_dim
        self.conv = nn.Conv1d(channels, channels, TAPS, groups=channels, **factory)
        self.a_bias = nn.Parameter(torch.full((host.heads,), MEMORY, **factory))
        self.D = nn.Parameter(torch.zeros(host.heads, **factory))
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)
        with torch.no_grad():
            self.conv.weight[:, :, -1] = 1

    def forward(self, tokens: torch.Tensor, step: torch.Tensor, reverse: bool) -> torch.Tensor:
        """Scan values, keys and queries (B, L, 3, heads, D), forward with a token's own pair, backward without.

        Args:
            step: (B, L, heads).
        """
        weight, bias = (x.to(tokens.dtype) for x in (self.conv.weight, self.conv.bias))
        ahead = (0, TAPS - 1) if reverse else (TAPS - 1, 0)
        line = F.pad(tokens.flatten(2).transpose(1, 2), ahead)
        line = F.conv1d(line, weight.flip(2) if reverse else weight, bias, groups=line.shape[1])
        value, key, query = line.transpose(1, 2).unflatten(2, tokens.shape[2:]).unbind(2)
        step = F.softplus(step + self.a_bias.to(step.dtype)).clamp(min=1e-12)  # nothing is divided by 0
        chunk = 64 if value.shape[1] < 4096 else 128
        # The operator multiplies inputs by the step; here they are not.
        scanned = ssd(
            value / step[..., None], step, -torch.ones_like(step[0, 0]), key, query, None, reverse=reverse, chunk=chunk
        )
        skip = self.D[:, None].to(value.dtype)
        if reverse:
            skip = skip - (query * key).sum(3, keepdim=True)
        return scanned + skip * value


class StateSpace(Mixer):
    """A mixer with MATE's global branch."""

    def __init__(
        self,
        host: Host,
        review: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Args:
        review: Whether averages of 8x8 patches come before the tokens in both directions; None for 1024 patches
            or more.
        """
        super().__init__(host)
        self.review = review
        factory = dict(device=device, dtype=dtype)
        self.z_proj = nn.Linear(host.dim, host.heads * host.head_dim, **factory)
        self.a_proj = nn.Linear(host.dim, host.heads, **factory)
        self.fwd, self.bwd = Direction(host, **factory), Direction(host, **factory)
        for layer in (self.z_proj, self.a_proj):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.z_proj.bias, OPEN)

    def scanned(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        """The global branch (B, heads, N, D), in float32 at least."""
        gate, step = self.z_proj(place.x), self.a_proj(place.x)
        dtype = accumulator(query, key, value)
        with without_autocast(value):
            query = query.to(dtype) * query.shape[-1] ** -0.5
            tokens = torch.stack([value.to(dtype), key.to(dtype), query], 2).permute(0, 3, 2, 1, 4)  # B N 3 heads D
            tokens, step, extra = self._ordered(tokens, step.to(dtype), place)
            # Review tokens come first in the direction of the scan, in the same order for both directions.
            ahead = [torch.cat(pair, 1) for pair in zip(extra, (tokens, step))]
            behind = [torch.cat((own, first.flip(1)), 1) for own, first in zip((tokens, step), extra)]
            out = self.fwd(*ahead, reverse=False)[:, extra[0].shape[1] :]
            out = out + self.bwd(*behind, reverse=True)[:, : tokens.shape[1]]
            out = self._restored(out, place)
            gate = F.silu(gate.to(dtype)).unflatten(2, out.shape[2:])
            return (out * gate).transpose(1, 2)

    def _turned(self) -> bool:
        """Whether patches are scanned by columns: in layers with odd numbers."""
        return self.host.layer % 2 == 1

    def _ordered(self, tokens: torch.Tensor, step: torch.Tensor, place: Place):
        """Tokens and steps in the order of the scan, and review tokens and their steps (none of them: length 0)."""
        front, patches = tokens.tensor_split([place.prefix], 1)
        front_step, patch_step = step.tensor_split([place.prefix], 1)
        maps = torch.cat([patches.flatten(2), patch_step], 2).transpose(1, 2).unflatten(2, place.grid)
        maps = maps.transpose(2, 3) if self._turned() else maps
        review = maps.shape[2] * maps.shape[3] >= LONG if self.review is None else self.review
        cells = [(side + CELL - 1) // CELL if review else 0 for side in maps.shape[2:]]
        pooled = F.adaptive_avg_pool2d(maps, cells) if review else maps[:, :, :0, :0]

        def split(maps):
            flat = maps.flatten(2).transpose(1, 2)
            return flat[..., : -step.shape[2]].unflatten(2, tokens.shape[2:]), flat[..., -step.shape[2] :]

        patches, patch_step = split(maps)
        return torch.cat([front, patches], 1), torch.cat([front_step, patch_step], 1), split(pooled)

    def _restored(self, out: torch.Tensor, place: Place) -> torch.Tensor:
        """Tokens (B, N, heads, D) in the grid's order."""
        if not self._turned():
            return out
        front, patches = out.tensor_split([place.prefix], 1)
        return torch.cat([front, patches.unflatten(1, place.grid[::-1]).transpose(1, 2).flatten(1, 2)], 1)
