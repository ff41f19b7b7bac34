"""Attention within sequences in standard operations: all sequences of one length at a time, by PyTorch's attention."""

import torch

from terrazzo.kernels.dispatch import opaque


def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Attention within sequences; arguments as in `terrazzo.kernels.varlen_attention`. The host reads the lengths."""
    lengths = cu_seqlens.diff().tolist()
    parts = [x.split(lengths) for x in (query, key, value)]
    found = list(parts[0])
    for length in set(lengths) - {0}:
        sequences = [i for i, other in enumerate(lengths) if other == length]
        q, k, v = (torch.stack([part[i] for i in sequences]).transpose(1, 2) for part in parts)
        for i, out in zip(sequences, opaque.attention("varlen_attention", q, k, v).transpose(1, 2)):
            found[i] = out
    return torch.cat([query[:0], *found])
