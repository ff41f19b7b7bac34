"""What fused forms that read queries and keys block by block share before they import triton."""

from dataclasses import dataclass

import torch

from terrazzo.kernels.triton_host.machine import Limit, block_of, interpreted, precision

HEAD_DIM = Limit(0, 128, "needs a head_dim of at most 128")


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut: queries and keys at a time, and how it is compiled."""

    queries: int
    keys: int
    warps: int
    stages: int

    def constants(self, kernel, head_dim: int, dtype: torch.dtype) -> dict[str, object]:
        """What a kernel is compiled for."""
        return dict(
            HEAD_DIM=head_dim,
            BLOCK_D=block_of(head_dim),
            BLOCK_N=self.queries,
            BLOCK_L=self.keys,
            PRECISION=precision(dtype),
            INTERPRETED=interpreted(kernel),
            num_warps=self.warps,
            num_stages=self.stages,
        )
