"""What the benchmark has to know about an operator."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Operator:
    """An operator, the plain forms that it is compared with, and their inputs.

    Attributes:
        name: as in `terrazzo.kernels`.
        run: the operator; takes the inputs and `backend`.
        peers: other functions of the inputs that compute the same, by name; measured as they are.
        compiled: for peers that are also measured under `torch.compile`, what makes the compiled form; called for each
            case.
        variant: the variant of the rows.
        axes: what the numbers of a size are, the batch first.
        arguments: names of the inputs that have gradients.
        inputs: from a size and a device to the inputs, first random float32 tensors, then integer tensors.
        at_224: sizes, without the batch, of a small model's layers at 224 x 224; a quick run measures only these.
        larger: further sizes.
        gpu_peers: as `peers`, for peers that PyTorch has only for GPUs.
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
