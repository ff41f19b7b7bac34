"""Grouped linear layers by their definition: one group after another, in any floating dtype. It is authoritative."""

import torch


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor
) -> torch.Tensor:
    """`x[offsets[e]:offsets[e + 1]] @ weight[e].T + bias[e]`; arguments as in `terrazzo.kernels.grouped_linear`."""
    found = []
    for e, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist())):
        out = x[begin:end] @ weight[e].T
        found.append(out if bias is None else out + bias[e])
    return torch.cat(found)
