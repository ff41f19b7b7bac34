"""Plans of every kind for tests of block-sparse attention, with the tensors they need."""

import importlib

import torch

from terrazzo.kernels import block_sparse_attention

plans = importlib.import_module("terrazzo.kernels.block_sparse_attention")
Plan, Segment, plan_to_mask = plans.Plan, plans.Segment, plans.plan_to_mask


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(batch=2, heads=3, queries=37, keys=37, dim=8, width=None, dtype=torch.float64, device="cpu"):
    """Query, key and value that require gradients."""
    shapes = ((queries, dim), (keys, dim), (keys, width or dim))
    found = [
        torch.randn(batch, heads, *shape, dtype=torch.float64, generator=generator(i)) for i, shape in enumerate(shapes)
    ]
    return [x.to(device, dtype).requires_grad_() for x in found]


def lists(batch, heads, tiles, units, length, seed=0):
    """Different numbers from 0 to units - 1: (batch, heads, tiles, length) int32."""
    weights = torch.rand(batch, heads, tiles, units, generator=generator(seed))
    return weights.topk(length).indices.int()


def kinds(query, key, query_tile=8, key_tile=8, width=None):
    """Plans by name for a call of at least 9 keys, and the further tensors with gradients of each.

    width: the last axis of the values, if it is not that of the queries.
    """
    (batch, heads, queries, dim), keys = query.shape, key.shape[2]
    tiles, blocks = -(-queries // query_tile), -(-keys // key_tile)
    like = dict(dtype=torch.float64, generator=generator(7))

    def leaf(*shape):
        return torch.randn(shape, **like).to(query.device, query.dtype).requires_grad_()

    index = lists(batch, heads, tiles, blocks, min(3, blocks))
    ragged = index.clone()
    ragged[0, 0, 0], ragged[-1, -1, :, -1] = -1, -1
    tokens = lists(1, heads, 1, keys, 7)
    count = torch.arange(tiles).remainder(3).view(1, 1, -1)
    mask = torch.rand(batch, keys, generator=generator(3)) > 0.3
    order = lists(1, 1, heads, queries, queries // 2 + 1)[0]  # 1 heads slots
    order[..., 2] = -1
    several = torch.randint(-1, queries, (batch, heads, 2 * query_tile + 3), generator=generator(4))
    index, ragged, tokens, count, mask, order, several = (
        x.to(query.device) for x in (index, ragged, tokens, count, mask, order, several)
    )
    own_key, own_value, shift = leaf(batch, heads, 6, dim), leaf(batch, heads, 6, width or dim), leaf()
    key_bias, block_bias = leaf(1, heads, keys), leaf(batch, 1, blocks)
    own = Segment("all", key=own_key, value=own_value, bias=shift)
    in_order, in_several = (-(-x.shape[-1] // query_tile) for x in (order, several))

    def plan(*segments, **more):
        return Plan(segments, query_tile, key_tile, **more)

    return {
        "all": (plan(Segment("all")), ()),
        "blocks": (plan(Segment("block", index)), ()),
        "ragged blocks": (plan(Segment("block", ragged)), ()),
        "counted blocks": (plan(Segment("block", index, count)), ()),
        "a bias of keys": (plan(Segment("block", ragged, bias=key_bias)), (key_bias,)),
        "a bias of blocks": (plan(Segment("block", index, bias=block_bias, key_mask=mask)), (block_bias,)),
        "one list": (plan(Segment("token", tokens, bias=key_bias)), (key_bias,)),
        "lists of keys": (plan(Segment("token", lists(batch, 1, tiles, keys, 9).to(query.device))), ()),
        "segments": (
            plan(Segment("block", ragged), own, Segment("token", tokens, bias=key_bias)),
            (own_key, own_value, shift, key_bias),
        ),
        "unique order": (plan(Segment("block", ragged[:, :, :in_order]), query_order=order), ()),
        "mean order": (
            plan(Segment("block", ragged[:, :, :in_several]), own, query_order=several, merge="mean"),
            (own_key, own_value, shift),
        ),
    }


KINDS = (
    "all",
    "blocks",
    "ragged blocks",
    "counted blocks",
    "a bias of keys",
    "a bias of blocks",
    "one list",
    "lists of keys",
    "segments",
    "unique order",
    "mean order",
)


def run(arguments, plan, more=(), backend="portable", **options):
    """Output, lse (0 for rows without keys), and the gradients of all tensors; zeros for tensors without a gradient."""
    out, lse = block_sparse_attention(*arguments, plan, backend=backend, **options)
    lse = lse.masked_fill(lse.isneginf(), 0)
    grads = [torch.randn(x.shape, dtype=torch.float64, generator=generator(9)).to(x) for x in (out, lse)]
    tensors = (*arguments, *more)
    found = torch.autograd.grad((out, lse), tensors, grads, allow_unused=True, retain_graph=True)
    return [out.detach(), lse.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(found, tensors))]
