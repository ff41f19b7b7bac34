"""DMA: attention to the keys for which a learned bias is largest.

Paper: Trainable Dynamic Mask Sparse Attention, arXiv 2508.02124.
Official code (BSD-3): github.com/SmallDoges/flash-dmattn.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.backbones._checks import number
from terrazzo.backbones.mixers._mixer import Host
from terrazzo.backbones.mixers._selector import Selector, Tokens, listed, ranked
from terrazzo.errors import InputError
from terrazzo.kernels.block_sparse_attention import Plan, Segment
from terrazzo.kernels.dispatch import arguments


class DMA(Selector):
    """out_i = sum_j softmax_j(s q_i k_j + delta_j) v_j over the kept keys j, with delta_j = a softplus(W v_j).

    W maps the values of all heads side by side to one number for each head, and `a` is one factor for each head. The
    `keep` patches with the largest delta are kept, the same for all queries. Tokens in front are always kept. The
    cost is N keep. Gradients reach W and a through the bias of kept keys.

    The paper's form is causal. The official constructor sets a = 0, so that all biases tie; here a is uniform in
    [-0.1, 0.1]. The queries of tokens in front attend to all tokens, without a bias.

    Source: arXiv 2508.02124, section 3, and the official code, whose bias is linear where the paper has exp.

    Args:
        keep: kept patches: a whole number, or a part of all patches between 0 and 1.
        block: None, or a number of neighbouring patches in raster order that are kept together, if more than half of
            them are among the `keep`.
        dense_up_to: maps up to this number of patches have softmax attention.
    """

    def __init__(
        self,
        host: Host,
        keep: int | float = 0.25,
        block: int | None = None,
        dense_up_to: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(host, dense_up_to)
        self.keep = number("keep", keep)
        if self.keep <= 0 or (self.keep >= 1 and self.keep != int(self.keep)):
            raise InputError(f"keep must be a whole number of patches, or a part between 0 and 1, got {keep!r}")
        self.block = None if block is None else arguments.whole(block, "block", 1)
        self.factor = nn.Parameter(torch.empty(host.heads, device=device, dtype=dtype).uniform_(-0.1, 0.1))
        self.delta = nn.Linear(host.heads * host.head_dim, host.heads, bias=False, device=device, dtype=dtype)

    def edges(self, grid: tuple[int, int]) -> tuple[int, ...]:
        return (1,)

    def plan(self, tokens: Tokens) -> Plan:
        front, bias = self.biases(tokens.front_value), self.biases(tokens.value)
        segments = []
        if tokens.front_key.shape[2]:
            segments = [Segment("all", key=tokens.front_key, value=tokens.front_value, bias=front)]
        patches = bias.shape[2]
        keep = math.ceil(self.keep * patches) if self.keep < 1 else int(self.keep)
        if keep >= patches:
            return Plan([*segments, Segment("all", bias=bias)])
        # Of equal biases, those of the first patches are kept.
        index = ranked(bias.detach())[1][..., :keep]
        if self.block is not None:
            index = listed(_smoothed(index, patches, self.block))
        return Plan([*segments, Segment("token", index.unsqueeze(2), bias=bias)])

    def biases(self, value: torch.Tensor) -> torch.Tensor:
        """The bias of each key: values (B, heads, N, D) to (B, heads, N)."""
        found = F.softplus(self.delta(value.transpose(1, 2).flatten(2))) * self.factor
        return found.transpose(1, 2)


def _smoothed(index: torch.Tensor, patches: int, block: int) -> torch.Tensor:
    """All patches of the blocks of which more than half are listed: (B, heads, keep) to (B, heads, patches) bool."""
    kept = torch.zeros(*index.shape[:2], patches, dtype=torch.bool, device=index.device).scatter(-1, index, True)
    blocks = F.pad(kept, (0, -patches % block)).unflatten(-1, (-1, block)).sum(-1)
    sizes = F.pad(torch.ones(patches, device=index.device), (0, -patches % block)).unflatten(0, (-1, block)).sum(-1)
    return (2 * blocks > sizes).repeat_interleave(block, -1)[..., :patches]
