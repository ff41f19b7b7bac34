"""Dropping patches by a score, for reducers that keep a fixed number of patches."""

import torch

from terrazzo.backbones._tokens import TokenState
from terrazzo.kernels.token_reduction import prune, similarity, unmerge


def drop(x: torch.Tensor, score: torch.Tensor, kept: int, state: TokenState) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the tokens in front and the `kept` best patches of x (B, T, C), in order, and record it in the state.

    In maps, a dropped patch gets the later updates of the kept patch that is most similar to it.

    Args:
        score: (B, T).
        kept: At least 1.

    Returns:
        The remaining tokens (B, M, C) and their scores (B, M).
    """
    left, places, parked = prune(x, score, k=kept, protect=state.prefix)
    dropped = places < 0
    if state.maps:
        near = similarity(unmerge(x, parked), left[:, state.prefix :]).argmax(2) + state.prefix
        assignment = places.scatter(1, parked, near)
    else:
        assignment = torch.where(dropped, state.prefix, places)
    size = kept_of(sizes(state, score), dropped, left.shape[1])
    state.reduced(x, left, assignment, size, dropped)
    return left, kept_of(score, dropped, left.shape[1])


def sizes(state: TokenState, like: torch.Tensor) -> torch.Tensor:
    """Patches that each token stands for, (B, T); 1 each in the shape and dtype of `like` before any reduction."""
    return torch.ones_like(like) if state.size is None else state.size


def kept_of(values: torch.Tensor, dropped: torch.Tensor, count: int) -> torch.Tensor:
    """The values (B, count) of the tokens that are not dropped, in order, of values (B, T)."""
    position = torch.arange(dropped.shape[1], device=dropped.device)
    return values.gather(1, torch.where(dropped, dropped.shape[1], position).argsort(1)[:, :count])
