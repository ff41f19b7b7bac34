"""Tracks of queries across clips: trajectory attention over all clips, and convolutions along each query's track."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.backbones._layers import WideLayerNorm
from terrazzo.clips.trajectory import TrajectoryAttention
from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast


class CrossClipTracker(nn.Module):
    """Mixes the queries of a video's clips; a query has the same index in each clip.

    A layer is trajectory attention over all queries of all clips, with a norm behind, and a temporal ASPP along the
    clips of each query, with a norm behind.

    Args:
        layers: Number of layers.
        dim: Channels C.
        heads: Heads of the attention.
        attention_dropout: Dropout of the attention's weights inside a clip.
        dropout: Dropout behind the convolutions.

    Source: arXiv 2311.18537, section 3.3.
    """

    def __init__(
        self, layers: int = 4, dim: int = 256, heads: int = 8, attention_dropout: float = 0.1, dropout: float = 0.1
    ):
        super().__init__()
        self.transformer_trajectory_self_attention_layers = nn.ModuleList(
            [_AttentionLayer(dim, heads, attention_dropout) for _ in range(layers)]
        )
        self.conv_short_aggregate_layers = nn.ModuleList([TemporalASPP(dim, dropout) for _ in range(layers)])
        self.conv_norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(layers)])

    def forward(self, queries: torch.Tensor) -> list[torch.Tensor]:
        """The queries (B, T, Q, C) of T clips after each layer."""
        outputs = []
        for attention, convolutions, norm in zip(
            self.transformer_trajectory_self_attention_layers, self.conv_short_aggregate_layers, self.conv_norms
        ):
            queries = attention(queries)
            tracks = queries.permute(0, 2, 3, 1).flatten(0, 1)  # BQ C T
            tracks = (tracks + convolutions(tracks)).transpose(1, 2)  # BQ T C
            queries = norm(tracks).unflatten(0, (len(queries), -1)).transpose(1, 2)
            outputs.append(queries)
        return outputs


class TemporalASPP(nn.Module):
    """Three convolutions of different reach along (B, C, T), joined by a 1x1 convolution.

    At the ends the first and the last element are repeated, so that any T works.

    Args:
        dim: Channels C.
        dropout: Dropout of the output.
    """

    def __init__(self, dim: int = 256, dropout: float = 0.1):
        super().__init__()
        options: dict[str, Any] = dict(kernel_size=3, padding="same", padding_mode="replicate")
        self._aspp_conv0 = nn.Conv1d(dim, dim, dilation=1, **options)
        self._aspp_conv1 = nn.Conv1d(dim, dim, dilation=2, **options)
        self._aspp_conv2 = nn.Conv1d(dim, dim, dilation=3, **options)
        self._proj_conv_bn_act = _JoinedConvolution(3 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, T) to (B, C, T)."""
        x = torch.cat([self._aspp_conv0(x), self._aspp_conv1(x), self._aspp_conv2(x)], 1)
        return self.dropout(self._proj_conv_bn_act(x))


class _JoinedConvolution(nn.Module):
    """A 1x1 convolution of (B, C, T), a norm over channels, computed in float32 at least, and GELU."""

    def __init__(self, inputs: int, dim: int):
        super().__init__()
        self.conv = nn.Conv1d(inputs, dim, 1, bias=False)
        self.norm = WideLayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.conv.weight, std=(2 / inputs) ** 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).transpose(1, 2)
        with without_autocast(x):
            normed = self.norm(x.to(accumulator(x)))
        return F.gelu(normed.to(x.dtype)).transpose(1, 2)


class _AttentionLayer(nn.Module):
    """Trajectory attention over the queries (B, T, Q, C) of all clips, with a norm behind."""

    def __init__(self, dim: int, heads: int, attention_dropout: float):
        super().__init__()
        self.self_attn = TrajectoryAttention(dim, heads, attention_dropout, joined=True)
        self.norm = nn.LayerNorm(dim)
        for parameter in self.self_attn.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        mixed = self.self_attn(queries.flatten(1, 2), frames=queries.shape[1])
        return self.norm(queries + mixed.view_as(queries))
