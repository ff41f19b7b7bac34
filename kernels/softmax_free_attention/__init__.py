"""Softmax-free attention: a Gaussian kernel in its low-rank form, by landmarks and Newton's iteration."""

import torch

from terrazzo.errors import InputError
from terrazzo.kernels.dispatch import arguments
from terrazzo.kernels.softmax_free_attention import op

__all__ = ["softmax_free_attention"]

SCOPES = ("matrix", "global")


def check_scope(alpha_scope: str) -> str:
    """Return the scope if it is one of `SCOPES`. InputError if not."""
    if alpha_scope not in SCOPES:
        raise InputError(f"alpha_scope must be 'matrix' or 'global', got {alpha_scope!r}")
    return alpha_scope


def _check(query, key, value, landmark) -> None:
    """Raise `InputError` for arguments that the definition does not allow."""
    arguments.check_tensors({"query": query, "value": value, "landmark": landmark}, key=key)
    tokens = {"query": query, "key": query if key is None else key, "value": value}
    if any(x.dim() != 4 for x in (*tokens.values(), landmark)) or any(x.shape != value.shape for x in tokens.values()):
        raise InputError(
            "query, key and value must be (B, heads, N, head_dim), all of one shape, and landmark (B, heads, m, "
            f"head_dim), got {', '.join(str(tuple(x.shape)) for x in tokens.values())} and {tuple(landmark.shape)}"
        )
    if landmark.shape[:2] != value.shape[:2] or landmark.shape[3] != value.shape[3]:
        raise InputError(
            "landmark must agree with value in batch, heads and head_dim, "
            f"got {tuple(landmark.shape)} and {tuple(value.shape)}"
        )
    if arguments.any_empty(*value.shape[1:], landmark.shape[2]):
        raise InputError(
            "there must be at least 1 head, 1 token, 1 landmark and a head_dim of at least 1, "
            f"got {tuple(value.shape)} and {tuple(landmark.shape)}"
        )


def softmax_free_attention(
    query: torch.Tensor,
    value: torch.Tensor,
    landmark: torch.Tensor,
    key: torch.Tensor | None = None,
    normalised: bool = False,
    alpha_scope: str = "matrix",
    implicit: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention with a Gaussian kernel instead of softmax, in low-rank form: G(q, l) M (G(k, l)^T v).

    G(x, y) = exp(-|x - y|^2 / 2), so scale queries and keys by D^(-1/4) first. M is nearly the inverse of G(l, l): 20
    steps of Newton's iteration, which define the result where they do not converge. Everything is in float32 at least,
    also under autocast, because steps double rounding errors and rows of M nearly cancel.

    Args:
        query: (B, heads, N, D), any strides.
        value: (B, heads, N, D).
        landmark: (B, heads, m, D).
        key: (B, heads, N, D); None: the queries, as published.
        normalised: False for SOFT, which adds 0.01 to the diagonal of G(l, l). True for SOFT++, which instead scales M
            by the inverse roots of the row sums of G(l, l) on both sides.
        alpha_scope: For SOFT++: whether each "matrix" has its own start of the iteration, or, as in the official code,
            all images and heads have one ("global"), so that an image's result depends on its neighbours in the batch.
        implicit: For SOFT++: whether the gradient is that of an inverse, as SOFT's always is; by default it goes
            through the steps, as in the official code.
        backend: "auto", "fused", "portable" or "reference"; see `terrazzo.kernels.use_backend`.

    Returns:
        (B, heads, N, D), the dtype of `value`.

    Raises:
        InputError: A shape or dtype that the definition does not allow.
        BackendError: `backend` names a form that cannot run here.

    Sources: SOFT, arXiv 2110.11945, section 3; SOFT++, arXiv 2207.03341, section 3.
    """
    _check(query, key, value, landmark)
    return op.run(query, key, value, landmark, bool(normalised), check_scope(alpha_scope), bool(implicit), backend)
