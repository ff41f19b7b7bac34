"""What the benchmark of an operator has to know of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Operator:
    """An operator, the plain forms that it is measured against, and the inputs on which they are.

    Attributes:
        name: as in `terrazzo.kernels`.
        run: the operator; takes the inputs and `backend`.
        peers: other functions of the inputs that compute the same, by name; measured as they are.
        compiled: what makes the form by `torch.compile` of a peer that is measured so, too; called anew for each case.
        variant: of the rows.
        axes: what the numbers of a size are, the batch first.
        arguments: names of the inputs that have gradients.
        inputs: from a size and a device to the inputs, random float32, and behind them those of whole numbers.
        at_224: sizes without the batch of the layers of a small model at 224 x 224, which a quick look measures.
        larger: further sizes.
        gpu_peers: as `peers`; those that PyTorch has for GPUs alone.
    """

    name: str
    run: Callable[..., torch.Tensor]
    peers: Mapping[str, Callable[..., torch.Tensor]]
    compiled: Mapping[str, Callable[[], Callable[..., torch.Tensor]]]
    variant: str
    axes: str
    arguments: tuple[str, ...]
    inputs: Callable[[tuple[int, ...], torch.device], Sequence[torch.Tensor]]
    at_224: tuple[tuple[int, ...], ...]
    larger: tuple[tuple[int, ...], ...]
    gpu_peers: Mapping[str, Callable[..., torch.Tensor]] = field(default_factory=dict)
