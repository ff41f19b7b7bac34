"""Pruning: tokens are dropped by a score, a fixed number of them or all that do not exceed a threshold."""

import torch
import torch.nn.functional as F

from terrazzo.errors import InputError
from terrazzo.kernels.dispatch import arguments
from terrazzo.kernels.token_reduction import portable
from terrazzo.kernels.token_reduction.merging import unmerge


def prune(
    x: torch.Tensor,
    score: torch.Tensor,
    k: int | None = None,
    threshold: torch.Tensor | float | None = None,
    protect: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keep the protected tokens in front and, in order, the k best others, or all others scored above a threshold.

    Args:
        x: (B, N, C). With a threshold B must be 1, because images keep different numbers of tokens: see `prune_packed`.
        score: (B, N). Among equals, the lowest index comes first. Scores of protected tokens are not read.
        k: the number of kept tokens in addition to the protected tokens.
        threshold: the score that unprotected tokens must exceed.

    Returns:
        Tokens (B, protect + k, C), the map (B, N) with -1 for parked tokens, and the indices of the parked tokens.

    Raises:
        InputError: Not one of `k` and `threshold`, a batch with a threshold, or a number out of range.
    """
    _check_scores(x, score, 3)
    batch, count = score.shape
    protect = arguments.whole(protect, "protect")
    if (k is None) == (threshold is None):
        raise InputError("prune takes either k or a threshold")
    if threshold is not None:
        arguments.check_threshold(threshold)
        if batch != 1:
            raise InputError(
                f"with a threshold, images keep different numbers of tokens, got a batch of {batch}: pack them"
            )
    position = torch.arange(count, device=x.device)
    front = position < protect
    if k is not None:
        k = arguments.whole(k, "k")
        if not 0 <= k <= count - protect:
            raise InputError(f"k must be 0 to {count - protect}, got {k}")
        ranks = portable.rank(score.detach().masked_fill(front, float("inf")))
        keep = ranks < protect + k
        kept, parked = protect + k, count - protect - k
    else:
        keep = front | (score.detach() > threshold)
        kept = int(keep.sum())
        parked = count - kept
    place = torch.where(keep, keep.long().cumsum(1) - 1, -1)
    # Kept tokens first, in order. This is a permutation of the tokens of each image.
    order = torch.where(keep, place, kept + (~keep).long().cumsum(1) - 1).argsort(1)
    index, rest = order.split([kept, parked], 1)
    return unmerge(x, index), place, rest


def _check_scores(x: torch.Tensor, score: torch.Tensor, axes: int) -> None:
    """Raise `InputError` unless there is a score for each token."""
    arguments.check_tensors({"x": x, "score": score})
    if x.dim() != axes or score.shape != x.shape[:-1]:
        raise InputError(
            f"x must be {'(B, N, C)' if axes == 3 else '(T, C)'} and score the same without channels, "
            f"got {tuple(x.shape)} and {tuple(score.shape)}"
        )


def prune_packed(
    x: torch.Tensor, score: torch.Tensor, threshold: torch.Tensor | float, cu_seqlens: torch.Tensor, protect: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keep each image's protected tokens in front and its tokens with a score above the threshold, in order.

    Args:
        x: (sum of T, C), the tokens of all images one after another.
        score: (sum of T,). Scores of protected tokens are not read.
        threshold: the score that unprotected tokens must exceed.
        cu_seqlens: (B + 1,) int32, where each image begins.

    Returns:
        The kept tokens, the new cu_seqlens, and the kept tokens' indices in x.

    Raises:
        InputError: Shapes that do not agree, or a threshold that is NaN.
    """
    _check_scores(x, score, 2)
    arguments.check_together({"x": x, "cu_seqlens": cu_seqlens})
    arguments.check_threshold(threshold)
    protect = arguments.whole(protect, "protect")
    begin = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=x.shape[0])
    front = torch.arange(x.shape[0], device=x.device) - begin < protect
    keep = front | (score.detach() > threshold)
    index = keep.nonzero().squeeze(1)
    in_front = F.pad(keep.cumsum(0), (1, 0))
    return x.index_select(0, index), in_front[cu_seqlens.long()].to(cu_seqlens.dtype), index
