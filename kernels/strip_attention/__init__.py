"""Strip attention: global attention whose queries and keys have one channel per head."""

import torch

from terrazzo.errors import InputError
from terrazzo.kernels.dispatch import arguments
from terrazzo.kernels.strip_attention import op

__all__ = ["strip_attention"]


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raise `InputError` for arguments that the definition does not allow."""
    arguments.check_tensors({"query": query, "key": key, "value": value})
    if query.dim() != 3 or key.dim() != 3 or value.dim() != 4:
        raise InputError(
            "query must be (B, N, heads), key (B, L, heads) and value (B, L, heads, head_dim), "
            f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if query.shape[0] != key.shape[0] or query.shape[2] != key.shape[2] or key.shape != value.shape[:3]:
        raise InputError(
            "query, key and value must agree in batch and heads, key and value also in length, "
            f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if key.shape[1] < 1:
        raise InputError("there must be at least 1 key, got 0: a softmax over no keys is not defined")
    if arguments.any_empty(*value.shape[2:]):
        raise InputError(f"there must be at least 1 head and a head_dim of at least 1, got {tuple(value.shape)}")
    arguments.check_one_dtype(query=query, key=key, value=value)


def strip_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """Attention of every query to every key, where both are one number per head: softmax(query x key) value.

    The scale is 1, the square root of one channel. The output of a query depends on this number alone, so row maxima
    are known beforehand: the product with the largest key, or with the smallest key for a negative query.

    Args:
        query: (B, N, heads), any strides.
        key: (B, L, heads), L at least 1.
        value: (B, L, heads, head_dim).
        backend: "auto", "fused", "portable" or "reference"; see `terrazzo.kernels.use_backend`.

    Returns:
        (B, N, heads, head_dim).

    Raises:
        InputError: A shape or dtype that the definition does not allow.
        BackendError: `backend` names a form that cannot run here.

    Source: S2AFormer, arXiv 2505.22195, strip self-attention: keys and values are reduced in space, queries and keys in
    channels; one channel per head, and the scale, are a reconstruction (model_cards/s2aformer.md).
    """
    _check(query, key, value)
    return op.run(query, key, value, backend)
