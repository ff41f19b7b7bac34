"""Trajectory attention: each token follows one track through the frames, then attends along it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.backbones._bare import is_bare
from terrazzo.errors import InputError


class TrajectoryAttention(nn.Module):
    """Attention inside each frame, which pools a track of one token per frame, then attention along the track.

    For a token s of frame g:

        x_sf = sum_m softmax_m(d^(-1/2) q_s k_fm) v_fm                      in each frame f on its own
        q'_s = W_q' x_sg;  (k'_sf, v'_sf) = W_kv' x_sf
        y_s  = W_o sum_f softmax_f(d^(-1/2) q'_s k'_sf) v'_sf

    Keys and values of tracks need not be computed: k' q' = x (W_k'^T q'), and the sum over frames can stand before
    W_v'. Then the large projection W_kv' meets each token once, and not once per frame. This changes rounding only. It
    is done where it saves work and the layer is unmodified; otherwise the layer `proj_kv` is called. The bias of k'
    adds the same number to all logits of a track, so it has no effect. Tracks are F times as large as the input.

    Args:
        dim: Channels C.
        heads: Heads; they divide C.
        attention_dropout: Dropout of the first attention's weights.
        joined: Whether one layer `qkv` projects queries, keys and values, as in the authors' cross-clip module;
            otherwise `q`, `k` and `v` do, as in their within-clip module.
        device, dtype: Device and type of the parameters.

    Raises:
        InputError: `heads` does not divide `dim`.

    Source: arXiv 2311.18537, equations 1 to 5; after Patrick et al., Keeping Your Eye on the Ball, NeurIPS 2021.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        attention_dropout: float = 0.0,
        joined: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if heads < 1 or dim % heads:
            raise InputError(f"heads must divide dim={dim}, got {heads}")
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.heads, self.attention_dropout, self.joined = heads, attention_dropout, joined
        self.scale = (dim // heads) ** -0.5
        if joined:
            self.qkv = nn.Linear(dim, 3 * dim, **factory)
        else:
            self.q, self.k, self.v = (nn.Linear(dim, dim, **factory) for _ in range(3))
        self.proj_q = nn.Linear(dim, dim, **factory)
        self.proj_kv = nn.Linear(dim, 2 * dim, **factory)
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor | None = None, value: torch.Tensor | None = None, frames: int = 1
    ) -> torch.Tensor:
        """Mix the tokens of clips.

        Args:
            query: (B, F n, C), all tokens of a frame before the tokens of the next frame.
            key, value: Tensors like `query`; `query` itself by default. A joined layer takes queries only.
            frames: F.

        Returns:
            (B, F n, C).

        Raises:
            InputError: F does not divide the number of tokens, or a joined layer got keys or values.
        """
        if frames < 1 or query.shape[1] % frames:
            raise InputError(f"frames must divide the number of tokens, got {frames} and {query.shape[1]}")
        query, key, value = self._projected(query, key, value)
        own, tracks = self._tracks(query, key, value, frames)
        first = self.proj_q(own) * self.scale
        return self.proj(self._along(first.unflatten(-1, (self.heads, -1)), tracks))

    def _projected(
        self, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Queries, keys and values (B, heads, F n, d)."""
        if self.joined:
            if key is not None or value is not None:
                raise InputError(
                    "a joined layer projects queries, keys and values of one tensor: pass no key, no value"
                )
            given = self.qkv(query).chunk(3, -1)
        else:
            key, value = query if key is None else key, query if value is None else value
            given = self.q(query), self.k(key), self.v(value)
        return [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in given]

    def _tracks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, frames: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled tokens of each token's own frame (B, F n, C), and of all frames (B, F n, F, C): its track."""
        tokens, dropout = query.shape[2] // frames, self.attention_dropout if self.training else 0.0
        pooled, own = [], []
        for frame in range(frames):
            inside = slice(frame * tokens, (frame + 1) * tokens)
            x = F.scaled_dot_product_attention(query, key[:, :, inside], value[:, :, inside], dropout_p=dropout)
            pooled.append(x.transpose(1, 2).flatten(2))
            own.append(pooled[-1][:, inside])
        return torch.cat(own, 1), torch.stack(pooled, 2)

    def _along(self, query: torch.Tensor, tracks: torch.Tensor) -> torch.Tensor:
        """Attention of (B, S, heads, d) along tracks (B, S, F, C): (B, S, C)."""
        dim, frames = tracks.shape[-1], tracks.shape[2]
        # Multiply-adds per token: F (2 C^2 + 2 C) against 2 C^2 + 2 F heads C.
        saves = frames * (dim + 1) > dim + frames * self.heads
        if saves and is_bare(self.proj_kv):
            return self._along_unprojected(query, tracks)
        key, value = (x.unflatten(-1, (self.heads, -1)) for x in self.proj_kv(tracks).chunk(2, -1))  # B S F heads d
        weights = torch.einsum("bshd,bsfhd->bshf", query, key).softmax(-1)
        return torch.einsum("bshf,bsfhd->bshd", weights, value).flatten(2)

    def _along_unprojected(self, query: torch.Tensor, tracks: torch.Tensor) -> torch.Tensor:
        weight_key, weight_value = (w.unflatten(0, (self.heads, -1)) for w in self.proj_kv.weight.chunk(2))  # heads d C
        query = torch.einsum("bshd,hdc->bshc", query, weight_key)
        weights = (query @ tracks.transpose(-1, -2)).softmax(-1)  # B S heads F
        summed = weights @ tracks  # B S heads C
        value = torch.einsum("bshc,hdc->bshd", summed, weight_value).flatten(2)
        return value + self.proj_kv.bias.chunk(2)[1]
