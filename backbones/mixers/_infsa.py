"""What both forms of infinite self-attention share, in mixers and in the family `infvit`: the factor rho."""

import math

import torch
from torch import nn

from terrazzo.backbones._checks import number
from terrazzo.backbones._layers import learned_number, take_scalars
from terrazzo.backbones.mixers._mixer import Host, Mixer
from terrazzo.errors import InputError

EPS = 1e-6


class LearnedRho(nn.Module):
    """A module with a learned factor rho between 0 and 1.

    The official code converts rho to a Python number, so that it is never trained. Here `rho_logit` has a gradient.
    """

    rho_logit: nn.Parameter

    def add_rho(self, rho: float, trainable: bool, **factory) -> None:
        """Make the parameter.

        Args:
            rho: Its value, between 0 and 1.
            trainable: Whether training changes it.

        Raises:
            InputError: rho is not between 0 and 1.
        """
        rho = number("rho", rho)
        if not 0 < rho < 1:
            raise InputError(f"rho must be between 0 and 1, got {rho}")
        self.rho_logit = learned_number(math.log(rho / (1 - rho)), requires_grad=bool(trainable), **factory)
        self.register_load_state_dict_pre_hook(take_scalars)

    def rho(self, dtype: torch.dtype) -> torch.Tensor:
        """(1,), the factor."""
        return self.rho_logit.to(dtype).sigmoid()


class InfiniteAttention(LearnedRho, Mixer):
    """A mixer with a learned factor rho between 0 and 1."""

    needs_grid = False

    def __init__(
        self,
        host: Host,
        rho: float = 0.95,
        rho_trainable: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Args:
        rho: The norm of the attention matrix at the start, between 0 and 1.
        rho_trainable: Whether training changes rho. The official code never does.
        """
        super().__init__(host)
        self.add_rho(rho, rho_trainable, device=device, dtype=dtype)
