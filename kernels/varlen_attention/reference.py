"""Attention within sequences by its definition: one after another, in any floating dtype. It is authoritative."""

import math

import torch


def varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v within each sequence; arguments as in `terrazzo.kernels.varlen_attention`."""
    found = [query[:0]]
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))  # H T D
        weight = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        found.append((weight @ v).transpose(0, 1))
    return torch.cat(found)
