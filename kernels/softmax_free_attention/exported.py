"""Softmax-free attention as an exporter traces it: all weights at once, all steps; sizes may be symbolic."""

import torch

from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.kernels.softmax_free_attention import middle
from terrazzo.kernels.softmax_free_attention.reference import gaussian


def forward(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
    landmark: torch.Tensor,
    normalised: bool,
    alpha_scope: str,
) -> torch.Tensor:
    """Softmax-free attention; arguments and result as in `reference.softmax_free_attention`."""
    dtype = accumulator(query, value, landmark)
    query, wide, landmark = query.to(dtype), value.to(dtype), landmark.to(dtype)
    read = gaussian(query, landmark)
    write = read if key is None else gaussian(key.to(dtype), landmark)
    begin = middle.start(middle.gaussian(landmark), normalised, alpha_scope)
    between = middle.scaled(middle.newton(begin.matrix, begin.alpha), begin)
    return (read @ (between @ (write.transpose(2, 3) @ wide))).to(value.dtype)
