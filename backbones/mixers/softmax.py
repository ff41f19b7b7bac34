"""Softmax attention, the mechanism that the other mixers replace."""

import torch

from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._mixer import Mixer, softmax_attention


class Softmax(Mixer):
    """Softmax attention of all tokens to all tokens, by PyTorch."""

    needs_grid = False

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        return softmax_attention(query, key, value, place)
