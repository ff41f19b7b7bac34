"""The first state of a scan, put in place by steps before the sequence, so that no form of an operator needs more."""

import torch

STEP = 2.0**-20
"""The size of these steps: a power of two, so that products with it are exact, and small, so that decays are near 1."""


def entering(state: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """Inputs of N steps of size `STEP`, of which step n adds to number n of a state, so that they make `state`.

    Args:
        state: (..., N).
        decay: The logarithm of what a step of size 1 leaves of each number, at most 0; a shape that fits `state`.

    Returns:
        (..., N), for each step its input. It makes up for the decay in the steps behind it.
    """
    count = state.shape[-1]
    later = torch.arange(count - 1, -1, -1, device=state.device, dtype=state.dtype)
    return state / STEP * torch.exp(-STEP * later * decay)
