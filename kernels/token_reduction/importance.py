"""The attention that each token receives, and attention itself, without the whole matrix in memory."""

from collections.abc import Callable

import torch

from terrazzo.errors import InputError
from terrazzo.kernels.dispatch import arguments
from terrazzo.kernels.token_reduction import op, portable


def _check_queries(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise `InputError` for arguments that the mean of attention does not take."""
    arguments.check_tensors({"query": query, "key": key}, bias=bias)
    if query.dim() != 4 or query.shape != key.shape or arguments.any_empty(*query.shape[1:]):
        raise InputError(
            "query and key must be (B, H, N, D), H, N and D at least 1, both of one shape, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    arguments.check_one_dtype(query=query, key=key)
    if bias is not None and bias.shape != (query.shape[0], query.shape[2]):
        raise InputError(f"bias must be {(query.shape[0], query.shape[2])}, got {tuple(bias.shape)}")


def column_mean(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """The attention that each key receives, averaged over heads and queries. It adds up to 1 and has no gradient.

    The attention matrix is not kept: one tile is held at a time.

    Args:
        query, key: (B, H, N, D).
        bias: (B, N), added to the logits of keys, or None.
        backend: as in `plan`.

    Returns:
        (B, N), in float32 at least.

    Raises:
        InputError: Shapes, dtypes or devices that do not agree.
        BackendError: `backend` names a form that cannot run here.
    """
    _check_queries(query, key, bias)
    return op.column_mean(query, key, bias, backend)


def row_mean(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None = None, rows: int = 1) -> torch.Tensor:
    """The attention of the first tokens to each key, averaged over heads and these tokens. It adds up to 1.

    With a class token in front this is class attention. Only these rows of the matrix are computed. They have a
    gradient.

    Args:
        query, key, bias: as in `column_mean`.
        rows: the number of first tokens.

    Returns:
        (B, N), in float32 at least.

    Raises:
        InputError: Shapes, dtypes or devices that do not agree, or `rows` out of range.
    """
    _check_queries(query, key, bias)
    rows = arguments.whole(rows, "rows", 1)
    if rows > query.shape[2]:
        raise InputError(f"rows must be 1 to the {query.shape[2]} tokens, got {rows}")
    return portable.attention_weights(query[:, :, :rows], key, bias).mean((1, 2))


def attention(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """`column_mean`, and a function from values (B, H, N, D) to the attention's output of the same shape.

    Callers can choose values by the mean. On a GPU the fused kernels compute the mean and PyTorch computes attention.
    Elsewhere a small weight matrix is computed once for both; of a larger one neither keeps more than a tile.
    """
    _check_queries(query, key, bias)
    return op.attention(query, key, bias)
