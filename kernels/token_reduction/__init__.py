"""Token reduction that can be undone: plans of merged tokens, their means, and the way back to every position."""

from terrazzo.kernels.token_reduction.importance import attention, column_mean, row_mean
from terrazzo.kernels.token_reduction.merging import compose, merge, prop_bias, unmerge
from terrazzo.kernels.token_reduction.pairing import ordered, pair, plan_of, similarity
from terrazzo.kernels.token_reduction.planning import Plan, limit, plan
from terrazzo.kernels.token_reduction.pruning import prune, prune_packed

__all__ = [
    "Plan",
    "attention",
    "column_mean",
    "compose",
    "limit",
    "merge",
    "ordered",
    "pair",
    "plan",
    "plan_of",
    "prop_bias",
    "prune",
    "prune_packed",
    "row_mean",
    "similarity",
    "unmerge",
]
