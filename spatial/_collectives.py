"""The exchanges between processes, with gradients, on PyTorch's functional collectives.

The module `torch.distributed._functional_collectives` has a leading underscore, so PyTorch may change it. No other file
imports it, and a test runs these functions with the installed version. Version 2.14.1 has been read.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional


def swap(x: torch.Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Send parts of a flat tensor to all ranks, and return the parts that they sent, one after another.

    Args:
        x: Numbers for rank 0, then numbers for rank 1, and so on; contiguous.
        sent, received: Numbers for each rank and from each rank; 0 is allowed.
    """
    out = functional.all_to_all_single_autograd(x, list(received), list(sent), group)
    # Waiting here keeps gloo from complaining of results that nobody read.
    return functional.wait_tensor(out)


def total(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over all ranks. The gradient is the sum of all ranks' gradients."""
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))
