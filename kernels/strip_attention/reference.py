"""Strip attention by its definition: each pair's product, a softmax over keys, a mean of values. It is authoritative.

Source: S2AFormer, arXiv 2505.22195, strip self-attention: attention whose queries and keys have one channel per head.
"""

import torch


def strip_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of scalar queries to scalar keys, separately for each head.

    Args:
        query: (B, N, heads), any floating dtype.
        key: (B, L, heads).
        value: (B, L, heads, D).

    Returns:
        (B, N, heads, D). Memory: B * heads * N * L weights.
    """
    score = query.transpose(1, 2).unsqueeze(-1) * key.transpose(1, 2).unsqueeze(-2)  # B heads N L
    return torch.einsum("bhnl,blhd->bnhd", score.softmax(-1), value)
