"""Checks of token reduction's Triton kernels. Tests run them in Triton's interpreter, and on a GPU if available.

Functions take and return plain values, because tests call them in a process pool (`tests/kernels/conftest.py`).
"""

import importlib
import math

import torch

from support.triton_common import guarded, limits, poisoned, replaced
from terrazzo.kernels import token_reduction as reduction
from terrazzo.kernels import use_backend

FOLDER = "terrazzo.kernels.token_reduction"


def inputs(count, batch=2, dim=5, dtype="float32", padding=0, seed=0, exact=False, device="cpu"):
    """Tokens, sizes of 1 to 5, importances that add up to 1; NaN surrounds them in memory.

    padding: the number of last tokens with size 0.
    exact: tokens hold 1 and -1; tokens of size 1 have importance 1, tokens of size 2 have importance 3. If `dim` is a
    power of 4, cosines have no rounding error in any dtype: two attractions are equal to the bit, or far from equal.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, count, dim, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 6, (batch, count), generator=generator).double()
    importance = torch.randn(batch, count, generator=generator, dtype=torch.float64)
    if exact:
        x, size = x.sign(), size % 2 + 1
        importance = 2 * size - 1
    else:
        importance = importance.softmax(-1)
    size[:, count - padding :] = 0
    tensors = (x.to(getattr(torch, dtype)), size.float(), importance.float())
    return [guarded(t.to(device)) for t in tensors]


def plans(cases, device="cpu"):
    """The largest difference of each case between the fused map and the definition's map in float64.

    A case holds keyword arguments of `plan` and of `inputs`; `size=True` and `importance=True` pass these tensors.
    """
    names = ("count", "batch", "dim", "dtype", "padding", "seed", "exact")
    found = []
    for case in cases:
        case = dict(case)
        about = {name: case.pop(name) for name in names if name in case}
        x, size, importance = inputs(**about, device=device)
        extras = {"size": size, "importance": importance}
        extras = {name: extras[name] if case.pop(name) else None for name in extras if name in case}
        judge = case.pop("judge", "reference")
        with poisoned(device):
            ours = reduction.plan(x, backend="fused", **case, **extras)
        extras = {name: None if t is None else t.double() for name, t in extras.items()}
        wanted = reduction.plan(x.double(), backend=judge, **case, **extras)
        assert ours.M == wanted.M
        found.append((ours.map - wanted.map).abs().max().item())
    return found


def ties(bidirectional, count=11, dtype="float32", device="cpu"):
    """The map of a constant image."""
    x = torch.ones(1, count, 3, dtype=getattr(torch, dtype), device=device)
    return reduction.plan(x, r=4, bidirectional=bidirectional, backend="fused").map[0].tolist()


def not_a_number(device="cpu"):
    """Whether tokens of NaN still give a map onto [0, M): as indices, its values must not leave a tensor."""
    x, size, _ = inputs(70, device=device)
    x[0] = math.nan
    x[1, ::3] = math.nan
    found = reduction.plan(x, r=20, size=size, bidirectional=True, backend="fused")
    return all(row.unique().tolist() == list(range(found.M)) for row in found.map)


def _pooled(x, found, weight, size, backend):
    out, sizes, _ = reduction.merge(x, found, weight, size, backend=backend)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, x, grad), sizes]


def _groups(kind, tokens, groups, batch, device):
    """Maps onto [0, groups): "random", or each group has a single token and the first group has all others."""
    generator = torch.Generator().manual_seed(2)
    found = torch.cat([torch.arange(groups), torch.zeros(tokens - groups, dtype=torch.int64)]).repeat(batch, 1)
    if kind == "random":
        found[:, groups:] = torch.randint(groups, (batch, tokens - groups), generator=generator)
        found = torch.stack([row[torch.randperm(tokens, generator=generator)] for row in found])
    return reduction.Plan(found.to(device), groups)


def pool_errors(tokens, groups, channels=8, dtype="float32", kind="random", padding=0, device="cpu"):
    """The errors of pooling, of its gradient and of sizes, and their limits: see `triton_common.limits`."""
    x, size, weight = inputs(tokens, 2, channels, dtype, padding, device=device)
    found = _groups(kind, tokens, groups, 2, device)
    weight = guarded(weight * (size > 0))  # padding has no weight; a group may hold only padding
    wanted = _pooled(x.detach().double().requires_grad_(), found, weight.double(), size.double(), "reference")
    plain = _pooled(x.detach().requires_grad_(), found, weight, size, "reference")
    with poisoned(device):
        ours = _pooled(x.detach().requires_grad_(), found, weight, size, "fused")
    units = {torch.float32: 3, torch.bfloat16: 1, torch.float16: 1}.items()
    return limits(("out", "x", "sizes"), ours, plain, wanted, units)


def repeats(device="cpu"):
    """Whether two runs give the same bits."""
    x, size, weight = inputs(130, device=device)
    x.requires_grad_()
    found = reduction.plan(x, r=40, size=size, importance=weight, backend="fused")
    first, second = (_pooled(x, found, weight, size, "fused") for _ in range(2))
    query = x.detach().unsqueeze(1)
    first, second = (
        [*values, reduction.column_mean(query, query, size, backend="fused")] for values in (first, second)
    )
    return all(torch.equal(a, b) for a, b in zip(first, second))


def column_errors(count, heads=2, dim=8, bias=None, dtype="float32", layout="plain", batch=2, scale=1.0, device="cpu"):
    """The errors of the column mean. layout: "plain", or "packed" as heads of one projection; bias: logarithms of sizes
    ("padded": minus infinity at both ends), or None; scale: a factor of queries, and so of the rounding error of the
    number that is kept for each row."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(batch, count, 2, heads, dim, generator=generator, dtype=torch.float64)
    both = guarded(both.to(device, getattr(torch, dtype)))
    query, key = both.permute(2, 0, 3, 1, 4).unbind()
    query = query * scale
    if layout == "plain":
        query, key = guarded(query.contiguous()), guarded(key.contiguous())
    if bias is not None:
        size = torch.randint(1, 6, (batch, count), generator=generator).float().to(device)
        if bias == "padded":
            size[:, count - count // 3 :] = 0
            size[0, :40] = 0  # also the first keys
        bias = guarded(reduction.prop_bias(size))
    exact = None if bias is None else bias.double()
    wanted = reduction.column_mean(query.double(), key.double(), exact, backend="reference")
    plain = reduction.column_mean(query, key, bias, backend="reference")
    with poisoned(device):
        found = reduction.column_mean(query, key, bias, backend="fused")
    return limits(("mean",), [found], [plain], [wanted], {torch.float32: 5 * scale}.items())


def attends(device="cpu"):
    """The largest difference between fused and portable form in `attention`: mean, output and gradients."""
    results = []
    for backend in ("fused", "portable"):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, 2, 70, 8, generator=generator).to(device).requires_grad_() for _ in range(3))
        bias = torch.rand(2, 70, generator=generator).to(device)
        with use_backend(backend):
            mean, attend = reduction.attention(q, k, bias)
        out = attend(v)
        results.append([mean, out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    return max((a - b).abs().max().item() for a, b in zip(*results))


def mutated(helper):
    """How much results differ from the definition if a helper of the kernels is broken; "" breaks none."""
    modules = {
        "source_at": "fused_match",
        "target_at": "fused_match",
        "inverse_norm": "fused_match",
        "similarity": "fused_match",
        "share": "fused_pool",
        "masked_scores": "fused_columns",
        "exponential": "fused_columns",
    }
    changes = {}
    if helper:
        original = getattr(importlib.import_module(f"{FOLDER}.{modules[helper]}"), helper)

        def broken(*arguments, **options):
            found = original(*arguments, **options)
            if helper in ("source_at", "target_at"):
                return arguments[1] + (found - arguments[1] + 2) % 66
            return -found if helper == "similarity" else found * found + 1

        changes[f"{modules[helper]}.{helper}"] = broken
    cases = [dict(count=67, r=20, bidirectional=True), dict(count=67, r=20, partition="cell2x2", grid=(6, 11))]
    with replaced(FOLDER, changes):
        found = sum(plans([dict(case, size=True, criteria=(1, 0, 40)) for case in cases]))
        checks = (*pool_errors(66, 40).values(), *column_errors(66).values())
    return found + sum(not error <= 2 * allowed for error, allowed in checks)


def opcheck(device="cpu"):
    x, size, importance = inputs(21, device=device)
    ops = torch.ops.terrazzo
    plan = (x, 6, size, importance, 1, (1.0, 20.0, 40.0), True, ())
    torch.library.opcheck(ops.token_reduction.default, plan)
    found = ops.token_reduction(*plan)
    torch.library.opcheck(ops.token_reduction_pool.default, (x.requires_grad_(), found, 15, importance, size))
    query = x.detach().unsqueeze(1)
    torch.library.opcheck(ops.token_reduction_column_mean.default, (query, query, size))


class Reduce(torch.nn.Module):
    def forward(self, x, importance, r):
        found = reduction.plan(x, r=r, importance=importance, bidirectional=True)
        tokens, size, _ = reduction.merge(x, found, importance)
        later = reduction.plan(tokens, r=3, size=size)
        tokens, size, _ = reduction.merge(tokens, later, size=size)
        heads = tokens.unsqueeze(1)
        mean, attend = reduction.attention(heads, heads, reduction.prop_bias(size))
        return mean, size, reduction.unmerge(attend(heads).squeeze(1), reduction.compose(later.map, found.map))


def compiled():
    """The largest difference between compiled and eager results; the graph must not break."""
    function, worst = torch.compile(Reduce(), fullgraph=True, backend="aot_eager", dynamic=True), 0.0
    with use_backend("fused"):
        for count, r in ((21, 6), (34, 7)):
            x, _, importance = inputs(count)
            x.requires_grad_()
            results = []
            for form in (function, Reduce()):
                *rest, out = form(x, importance, r)
                results.append([*rest, out, *torch.autograd.grad(out.sum(), x)])
            worst = max(worst, *((a - b).abs().max().item() for a, b in zip(*results)))
    return worst


def model(device="cpu"):
    """The largest relative difference between fused and portable form in a small MCTF: outputs, maps, all gradients."""
    from terrazzo.backbones.mctf import MCTF

    torch.manual_seed(0)
    net = MCTF(r=6, depth=3, embed_dim=32, num_heads=2, num_classes=5).to(device).eval()
    image, results = torch.randn(2, 3, 96, 80).to(device), []
    for backend in ("portable", "fused"):
        with use_backend(backend):
            maps = net.forward_intermediates(image, intermediates_only=True)
            out = net(image)
            results.append([*maps, out, *torch.autograd.grad(out.square().sum(), list(net.parameters()))])
    return max(((a - b).norm() / a.norm().clamp(min=1e-5)).item() for a, b in zip(*results))


def empty(device="cpu"):
    """The shapes of results for an empty batch."""
    x, size, _ = inputs(9, batch=0, device=device)
    found = reduction.plan(x, r=2, backend="fused")
    out, sizes, _ = reduction.merge(x, found, size=size, backend="fused")
    query = x.unsqueeze(1)
    return [tuple(t.shape) for t in (found.map, out, sizes, reduction.column_mean(query, query, backend="fused"))]


def choices():
    """The forms that run on CPU tensors with "auto" and with a named backend, while Triton interprets."""
    op = importlib.import_module(f"{FOLDER}.op")
    why = op.OPERATOR.why
    x = torch.zeros(1, 9, 8)
    wide = op.ATTENTION.why("auto", torch.zeros(1, 1, 9, 136))
    return {
        "auto": (why("auto", x).name, why("auto", x).reasons["fused"]),
        "named": why("fused", x).name,
        "double": why("auto", x.double()).reasons["fused"],
        "wide": wide.reasons["fused"],
    }
