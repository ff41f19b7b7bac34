"""Block sizes that the fused forms of attention share; importing this file does not import triton."""

from dataclasses import dataclass

import torch

from terrazzo.kernels.triton_host.machine import Limit, block_of, interpreted, precision

HEAD_DIM = Limit(0, 128, "needs a head_dim of at most 128")


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut into blocks and compiled: queries and keys per block, warps, pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int

    def constants(self, kernel, head_dim: int, dtype: torch.dtype) -> dict[str, object]:
        """The constants that a kernel is compiled with."""
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
