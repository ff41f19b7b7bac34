"""Attention by a plan, by its definition: dense logits, with how often a key is listed. It is authoritative."""

import torch

from terrazzo.kernels.block_sparse_attention import merging
from terrazzo.kernels.block_sparse_attention.plan import Plan, multiplicity
from terrazzo.kernels.dispatch.dtypes import accumulator


def block_sparse_attention(
    query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None, plan: Plan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T + bias + ln(times that the plan lists the pair)) v over the keys of all segments.

    Arguments and results as in `terrazzo.kernels.block_sparse_attention`, in any floating dtype.
    Memory: B H slots (keys of all segments) logits.
    """
    rows = merging.in_slots(query, plan.query_order)
    logits, values = [], []
    for segment in plan.segments:
        own_key, own_value = (key, value) if segment.key is None else (segment.key, segment.value)
        keys = own_key.shape[2]
        logit = scale * (rows @ own_key.transpose(-1, -2)) + segment.shift()
        bias = segment.key_bias(keys, plan.key_tile, logit.dtype)
        if bias is not None:
            logit = logit + bias.unsqueeze(2)
        listed = multiplicity(plan, segment, rows.shape[2], keys).to(query.device)
        logits.append((logit + listed.log()).to(logit.dtype))
        values.append(own_value)
    logit = torch.cat(logits, -1)
    empty = logit.isneginf().all(-1, keepdim=True)
    logit = logit.masked_fill(empty, 0)
    out = logit.softmax(-1).masked_fill(empty, 0) @ torch.cat(values, 2)
    lse = logit.to(accumulator(query)).logsumexp(-1).masked_fill(empty.squeeze(-1), -torch.inf)
    return merging.from_slots(out, lse, plan.query_order, plan.merge, query.shape[2])
