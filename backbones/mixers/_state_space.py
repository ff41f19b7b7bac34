"""MATE's global branch: Mamba-2's scan in both directions, with queries, keys and values of the host.

See `terrazzo.backbones.mixers.ssd`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.backbones._checks import number
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

    def __init__(self, host: Host, scale: float, **factory):
        super().__init__()
        channels = 3 * host.heads * host.head_dim
        self.conv = nn.Conv1d(channels, channels, TAPS, groups=channels, **factory)
        self.a_bias = nn.Parameter(torch.full((host.heads,), MEMORY, **factory))
        self.D = nn.Parameter(torch.zeros(host.heads, **factory))
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)
        with torch.no_grad():
            self.conv.weight[:, :, -1] = 1
            self.conv.weight[2 * channels // 3 :, :, -1] = scale  # queries

    def forward(self, tokens: torch.Tensor, step: torch.Tensor, reverse: bool) -> torch.Tensor:
        """Scan values, keys and queries (B, L, 3, heads, D), forward with a token's own pair, backward without.

        Args:
            step: (B, L, heads).
        """
        value, key, query, step = self._convolved(tokens, step, reverse)
        chunk = 64 if value.shape[1] < 4096 else 128
        # The operator multiplies inputs by the step; here they are not.
        scanned = ssd(
            value / step[..., None], step, -torch.ones_like(step[0, 0]), key, query, None, reverse=reverse, chunk=chunk
        )
        skip = self.D[:, None].to(value.dtype)
        if reverse:
            skip = skip - (query * key).sum(3, keepdim=True)
        return scanned + skip * value

    def weights(self, tokens: torch.Tensor, step: torch.Tensor, reverse: bool) -> torch.Tensor:
        """The matrix of the scan (B, heads, L, L), for values behind their convolution."""
        _, key, query, step = self._convolved(tokens, step, reverse)
        query, key, step = query.transpose(1, 2), key.transpose(1, 2), step.transpose(1, 2)  # B heads L ...
        passed = step.cumsum(2)
        if reverse:  # from s back to t, the steps t to s - 1 forget
            passed = step - passed
        gone = (passed.unsqueeze(3) - passed.unsqueeze(2)).clamp(min=0)
        seen = torch.ones_like(gone[0, 0], dtype=torch.bool)
        seen = seen.triu(1) if reverse else seen.tril()
        found = (query @ key.transpose(2, 3)) * torch.where(seen, (-gone).exp(), 0)
        return found + torch.diag_embed(self.D.to(found.dtype)[:, None].expand(-1, found.shape[2]))

    def _convolved(self, tokens: torch.Tensor, step: torch.Tensor, reverse: bool) -> tuple[torch.Tensor, ...]:
        """Values, keys and queries (B, L, heads, D) behind their convolution, and positive steps (B, L, heads)."""
        weight, bias = (x.to(tokens.dtype) for x in (self.conv.weight, self.conv.bias))
        weight = (weight.flip(2) if reverse else weight).unsqueeze(2)
        # A channels_last image with one row needs no copy, and gives tokens whose channels lie side by side.
        line = tokens.flatten(2).transpose(1, 2).unsqueeze(2)
        line = F.conv2d(line, weight, bias, padding=(0, TAPS - 1), groups=line.shape[1])
        line = line[..., TAPS - 1 :] if reverse else line[..., : 1 - TAPS]
        value, key, query = line.squeeze(2).transpose(1, 2).unflatten(2, tokens.shape[2:]).unbind(2)
        step = F.softplus(step + self.a_bias.to(step.dtype)).clamp(min=1e-12)  # nothing is divided by 0
        return value, key, query, step


class StateSpace(Mixer):
    """A mixer with MATE's global branch."""

    def __init__(
        self,
        host: Host,
        scale: float = 1.0,
        review: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Args:
        scale: Factor of queries at the start. Sums over tokens have no normaliser, so 1 makes outputs hundreds of times
            larger than softmax attention's in a pretrained ViT. 1/64 was tried for 64 tokens.
        review: Whether averages of 8x8 patches come before the tokens in both directions; None for 1024 patches
            or more.
        """
        super().__init__(host)
        self.review, scale = review, number("scale", scale)
        factory = dict(device=device, dtype=dtype)
        self.z_proj = nn.Linear(host.dim, host.heads * host.head_dim, **factory)
        self.a_proj = nn.Linear(host.dim, host.heads, **factory)
        self.fwd, self.bwd = Direction(host, scale, **factory), Direction(host, scale, **factory)
        for layer in (self.z_proj, self.a_proj):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.z_proj.bias, OPEN)

    def scanned(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        """The global branch (B, heads, N, D), in float32 at least."""
        gate, step = self.z_proj(place.x), self.a_proj(place.x)
        dtype = accumulator(query, key, value)
        with without_autocast(value):
            ahead, behind = self._sequences(query.to(dtype), key.to(dtype), value.to(dtype), step.to(dtype), place)
            count = value.shape[2]
            out = self.fwd(*ahead, reverse=False)[:, -count:]
            out = out + self.bwd(*behind, reverse=True)[:, :count]
            out = self._restored(out, place)
            gate = F.silu(gate.to(dtype)).unflatten(2, out.shape[2:])
            return (out * gate).transpose(1, 2)

    def scan_weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        """The matrix of the global branch (B, heads, N, N): the scans, without convolution of values and without gate.

        Review tokens are means of patches, so their weights are shared among their patches.
        """
        step = self.a_proj(place.x.to(self.a_proj.weight.dtype)).to(query.dtype)
        ahead, behind = self._sequences(query, key, value, step, place)
        count, shares = query.shape[2], self._shares(query, place)
        forward = self.fwd.weights(*ahead, reverse=False)[:, :, -count:]
        backward = self.bwd.weights(*behind, reverse=True)[:, :, :count]
        found = forward[..., -count:] + backward[..., :count]
        if shares is not None:
            found = found + forward[..., :-count] @ shares + backward[..., count:] @ shares.flip(0)
        order = torch.arange(count, device=query.device)[None, :, None, None]
        order = self._restored(order, place).flatten()
        return found[:, :, order][:, :, :, order]

    def _sequences(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: torch.Tensor, place: Place
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """For each direction the tokens (B, L, 3, heads, D) and steps (B, L, heads), with review tokens."""
        given = (value, key, query * query.shape[-1] ** -0.5)
        tokens = torch.stack([x.transpose(1, 2) for x in given], 2)  # B N 3 heads D
        ahead, behind = [], []
        for x in (tokens, step):
            front, patches, review = self._ordered(x, place)
            # Review tokens come first in the direction of the scan, in the same order for both directions.
            ahead.append(torch.cat([review, front, patches], 1))
            behind.append(torch.cat([front, patches, review.flip(1)], 1))
        return ahead, behind

    def _cells(self, grid: tuple[int, int]) -> tuple[int, int] | None:
        """Rows and columns of the review tokens of a map; None if it has none."""
        review = grid[0] * grid[1] >= LONG if self.review is None else self.review
        return tuple((side + CELL - 1) // CELL for side in grid) if review else None

    def _shares(self, like: torch.Tensor, place: Place) -> torch.Tensor | None:
        """What each token, in the order of the scan, adds to the review tokens: (review tokens, N)."""
        grid = place.grid[::-1] if self._turned() else place.grid
        cells = self._cells(grid)
        if cells is None:
            return None
        patches = torch.eye(grid[0] * grid[1], dtype=like.dtype, device=like.device).unflatten(1, grid)
        return F.pad(F.adaptive_avg_pool2d(patches, cells).flatten(1).T, (place.prefix, 0))

    def _turned(self) -> bool:
        """Whether patches are scanned by columns: in layers with odd numbers."""
        return self.host.layer % 2 == 1

    def _ordered(self, x: torch.Tensor, place: Place) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of tokens or steps (B, N, ...) those in front, and in the order of the scan patches and review tokens."""
        front, patches = x.tensor_split([place.prefix], 1)
        maps = patches.flatten(2).transpose(1, 2).unflatten(2, place.grid)  # channels_last
        cells, turned = self._cells(place.grid), self._turned()
        pooled = maps[:, :, :0, :0] if cells is None else F.adaptive_avg_pool2d(maps, cells)

        def flat(maps):
            maps = maps.transpose(2, 3) if turned else maps
            return maps.flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])

        return front, flat(maps), flat(pooled)

    def _restored(self, out: torch.Tensor, place: Place) -> torch.Tensor:
        """Tokens (B, N, heads, D) in the grid's order."""
        if not self._turned():
            return out
        front, patches = out.tensor_split([place.prefix], 1)
        return torch.cat([front, patches.unflatten(1, place.grid[::-1]).transpose(1, 2).flatten(1, 2)], 1)
