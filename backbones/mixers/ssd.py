"""Mamba-2's scan in both directions, as in the global branch of MATE.

Papers: LinGen (MATE), CVPR 2025, arXiv 2412.09856; LinMU (M-MATE), TMLR 2026, arXiv 2601.01322; the scan without an
activation is Phi-Mamba's, arXiv 2408.10189. No official code of LinGen or LinMU was published.
"""

import torch

from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._state_space import StateSpace


class SSD(StateSpace):
    """out = silu(z) (y forward + y backward), y_t = C_t h_t + D x_t, h_t = a_t h_(t-1) + B_t x_t^T.

    Queries / sqrt(D), keys and values of the host serve as C, B and x, each after a causal depthwise convolution with 4
    taps. a = sigmoid(-(W u + b)) and z = V u + c depend on the input u of the host's projections. The backward scan
    leaves out a token's own pair, so that every pair counts once. Directions have their own convolution, b and D.

    The scan goes by rows in layers with even numbers, and by columns in the others. Tokens in front come before the
    patches and take part. From 1024 patches on, averages of 8x8 patches come first in both directions, and have no
    output.

    At the start the convolution is the identity, z is 1, D is 0 and a is 0.982, so that the mixer is linear attention
    with a long memory, without a normaliser: outputs grow with the number of tokens. The cost is linear in N.
    `terrazzo.kernels.ssd` computes the scan, in float32 at least.

    Rotary positions of the host turn queries and keys here, too; the papers keep them out of the scan.

    Source: arXiv 2601.01322 (Flex-MA branch), arXiv 2412.09856 (order of the scan, review tokens), arXiv 2408.10189.
    """

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        return self.scanned(query, key, value, place).to(value.dtype)

    def weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        return self.scan_weights(query, key, value, place)
