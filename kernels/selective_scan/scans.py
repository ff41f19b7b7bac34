"""The input of every form of the selective scan: K scans of one map, each with an order."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from terrazzo.kernels.dispatch.dtypes import accumulator


class Scans(NamedTuple):
    """The arguments of a call.

    Attributes:
        u: (B, L, K, D), or (B, L, 1, D) for the same map in all scans; pixels by rows.
        delta: (B, L, K, D), before bias and softplus.
        A: (K, D, N), real and at most 0.
        B, C: (B, L, K, N).
        D: (K, D), weight of the input in the output, or None.
        z: (B, L, K, D), gate, or None.
        delta_bias: (K, D), or None.
        delta_softplus: whether delta goes through a softplus, linear above 20.
        orders: K codes; see `orders`.
        width: width of the map.
        merge: whether the scans' outputs are summed: (B, L, D) in the dtype of the computation. Otherwise the output is
            (B, L, K, D) in the dtype of u. Pixels are by rows for all orders.
    """

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    delta_bias: torch.Tensor | None
    delta_softplus: bool
    orders: Sequence[int]
    width: int
    merge: bool

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the call computes."""
        return accumulator(self.u, self.delta, self.A, self.B, self.C)

    @property
    def length(self) -> int:
        return self.u.shape[1]
