"""SOFT's attention, and its plain PyTorch form with all weights in memory."""

from collections.abc import Sequence

import torch

from terrazzo.kernels import softmax_free_attention
from terrazzo.tools.bench.operators.operator import Operator


def inputs(sizes: tuple[int, ...], device: torch.device) -> Sequence[torch.Tensor]:
    """Query, value and landmark; queries and landmarks lie so close together that most weights count."""
    batch, tokens, landmarks, heads, dim = sizes
    query, value = (torch.randn(batch, tokens, heads, dim, device=device).transpose(1, 2) for _ in range(2))
    return [0.3 * query, value, 0.3 * torch.randn(batch, heads, landmarks, dim, device=device)]


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    squares = x.square().sum(-1, keepdim=True) + y.square().sum(-1).unsqueeze(-2) - 2 * x @ y.mT
    return torch.exp(-squares.clamp(min=0) / 2)


def plain(query: torch.Tensor, value: torch.Tensor, landmark: torch.Tensor) -> torch.Tensor:
    """The code of a user without the operator: all weights in memory, 20 batched steps, the gradient of an inverse."""
    dtype = value.dtype
    query, value, landmark = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, value, landmark))
    weight, matrix = _kernel(query, landmark), _kernel(landmark, landmark)
    with torch.no_grad():
        regular = matrix + 0.01 * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        inverse = 1.8 / matrix.sum(-1, keepdim=True).amax(-2, keepdim=True).square() * regular
        for _ in range(20):
            inverse = 2 * inverse - inverse @ regular @ inverse
    inverse = inverse - inverse @ (matrix - matrix.detach()) @ inverse
    return (weight @ (inverse @ (weight.mT @ value))).to(dtype)


SOFTMAX_FREE_ATTENTION = Operator(
    name="softmax_free_attention",
    run=softmax_free_attention,
    peers={"plain": plain},
    compiled={"plain": lambda: torch.compile(plain, dynamic=False)},
    variant="SOFT",
    axes="B x tokens x landmarks x heads x dim",
    arguments=("query", "value", "landmark"),
    inputs=inputs,
    # Three stages of SOFT-Tiny at 224, and at 512.
    at_224=((3136, 49, 2, 32), (784, 49, 4, 32), (196, 49, 10, 32)),
    larger=((16384, 256, 2, 32), (4096, 256, 4, 32), (1024, 256, 10, 32)),
)
