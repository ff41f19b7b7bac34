"""Checks of grouped linear layers' Triton kernels. Tests run them in Triton's interpreter, and on a GPU if available.

Functions take and return plain values, because tests call them in a process pool (`tests/kernels/conftest.py`).
"""

import importlib
import math

import torch

from support.triton_common import guarded, limits, poisoned, replaced
from terrazzo.kernels import grouped_linear, use_backend

FOLDER = "terrazzo.kernels.grouped_linear"
NAMES = ("out", "x", "weight", "bias")


def inputs(sizes, ins, outs, dtype=torch.float64, layout="plain", bias=True, device="cpu"):
    """x, weight and bias that require gradients, surrounded by NaN, and offsets.

    layout: "plain" (contiguous), "packed" (rows and matrices are parts of wider tensors), or "turned" (the last axis is
    not contiguous).
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(sizes), ins), (len(sizes), outs, ins), *([(len(sizes), outs)] if bias else [])]
    found = [torch.randn(shape, dtype=torch.float64, generator=generator).to(device, dtype) for shape in shapes]
    if layout == "packed":
        found = [guarded(torch.cat([x, x.new_full((*x.shape[:-1], 3), math.nan)], -1))[..., :-3] for x in found]
    elif layout == "turned":
        found = [guarded(x.transpose(-2, -1).contiguous()).transpose(-2, -1) for x in found]
    else:
        found = [guarded(x) for x in found]
    offsets = torch.tensor([0, *sizes]).cumsum(0, dtype=torch.int32).to(device)
    return [x.detach().requires_grad_() for x in found], offsets


def run(arguments, offsets, backend):
    """The output and all gradients."""
    out = grouped_linear(*arguments, *([None] if len(arguments) == 2 else []), offsets, backend=backend)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, arguments, grad)]


def exact(arguments, offsets):
    return run([x.detach().double().requires_grad_() for x in arguments], offsets, "reference")


def errors(
    sizes=(5, 0, 33),
    ins=17,
    outs=9,
    dtype="float32",
    layout="plain",
    bias=True,
    half_blocks=False,
    device="cpu",
):
    """The fused form's errors and limits: see `triton_common.limits`. half_blocks: use the blocks of half precision."""
    fused = importlib.import_module(f"{FOLDER}.fused")
    arguments, offsets = inputs(sizes, ins, outs, getattr(torch, dtype), layout, bias, device)
    wanted, plain = exact(arguments, offsets), run(arguments, offsets, "reference")
    changes = {}
    if half_blocks:
        blocks = fused.blocks
        changes["fused.blocks"] = lambda kernel, itemsize: blocks(kernel, 2)
    with replaced(FOLDER, changes), poisoned(device):
        found = run(arguments, offsets, "fused")
    # The interpreter truncates to bfloat16; a GPU rounds.
    units = {torch.float32: 3, torch.bfloat16: 1} if device == "cpu" else {torch.float32: 3}
    return limits(NAMES, found, plain, wanted, units.items())


def mutated(helper):
    """The largest difference between a result and the reference if a kernel's helper is broken; "" breaks none."""
    changes = {}
    if helper:
        original = getattr(importlib.import_module(f"{FOLDER}.fused_kernels"), helper.split()[0])

        def broken(*arguments, **options):
            found = original(*arguments, **options)
            if helper == "locate the next group":
                return found[0] + 1, *found[1:]
            if helper == "locate a row too late":
                return found[0], found[1] + 1, found[2]
            if helper == "locate an end too early":
                return *found[:2], found[2] - 1
            if helper == "block without masks":
                everywhere = (arguments[3] | ~arguments[3], arguments[4] | ~arguments[4])
                return original(*arguments[:3], *everywhere, *arguments[5:], **options)
            return found * 1.5

        changes[f"fused_kernels.{helper.split()[0]}"] = broken
    arguments, offsets = inputs((40, 0, 9, 70), 35, 34, torch.float32)
    wanted = exact(arguments, offsets)
    with replaced(FOLDER, changes), poisoned():
        found = run(arguments, offsets, "fused")
    differences = [(a.double() - b).abs().max().item() for a, b in zip(found, wanted)]
    return max(math.inf if math.isnan(x) else x for x in differences)


def alone(sizes=(7, 70, 1, 33), dtype="float32", device="cpu"):
    """Whether the results of every group equal, to the bit, its results alone."""
    arguments, offsets = inputs(sizes, 17, 9, getattr(torch, dtype), device=device)
    together = run(arguments, offsets, "fused")
    grad = torch.randn(together[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    same = True
    for e, (begin, end) in enumerate(zip(offsets.tolist(), offsets[1:].tolist())):
        rows = slice(begin, end)
        parts = (rows, slice(e, e + 1), slice(e, e + 1))
        own = [x.detach()[part].requires_grad_() for x, part in zip(arguments, parts)]
        out = grouped_linear(*own, torch.tensor([0, end - begin], device=device), backend="fused")
        found = [out, *torch.autograd.grad(out, own, grad[rows].to(out))]
        same &= all(torch.equal(a, b[part]) for a, b, part in zip(found, together, (rows, *parts)))
    return same


def repeats(dtype="float32", device="cpu"):
    """Whether two runs give the same bits."""
    arguments, offsets = inputs((40, 3, 130), 40, 33, getattr(torch, dtype), device=device)
    return all(torch.equal(a, b) for a, b in zip(*(run(arguments, offsets, "fused") for _ in range(2))))


def far_apart(device="cpu"):
    """The error if rows are 2^30 elements apart in memory: addresses need 64 bits."""
    storage = torch.empty(3 * 2**30 + 8, dtype=torch.float16, device=device)
    x = storage.as_strided((4, 8), (2**30, 1))
    generator = torch.Generator().manual_seed(0)
    near, weight = torch.randn(4, 8, generator=generator).half(), torch.randn(2, 5, 8, generator=generator).half()
    x.copy_(near)
    offsets = torch.tensor([0, 1, 4], dtype=torch.int32)
    out = grouped_linear(x, weight.to(device), None, offsets.to(device), backend="fused")
    wanted = grouped_linear(near.double(), weight.double(), None, offsets, backend="reference")
    return (out.cpu() - wanted).abs().max().item()


def empty(device="cpu"):
    """The shapes of output and gradients without any rows; all gradients are 0."""
    arguments, offsets = inputs((0, 0), 4, 5, torch.float32, device=device)
    results = run(arguments, offsets, "fused")
    assert all(not x.any() for x in results)
    return [tuple(x.shape) for x in results]


def opcheck(device="cpu"):
    arguments, offsets = inputs((9, 1, 20), 8, 5, torch.float32, device=device)
    torch.library.opcheck(torch.ops.terrazzo.grouped_linear.default, (*arguments, offsets, "fused"))


def compiled():
    """The largest difference between compiled and eager outputs and gradients; the graph must not break."""
    function = torch.compile(grouped_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    worst = 0.0
    for sizes in ((33, 5), (40, 11)):
        arguments, offsets = inputs(sizes, 8, 5, torch.float32)
        wanted = run(arguments, offsets, "fused")
        out = function(*arguments, offsets, backend="fused")
        grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
        found = [out, *torch.autograd.grad(out, arguments, grad)]
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip(found, wanted)))
    return worst


def model(device="cpu"):
    """The largest relative difference between fused and portable form in a small M3ViT: outputs, all gradients."""
    from terrazzo.backbones.m3vit import M3ViT

    torch.manual_seed(0)
    net = M3ViT(embed_dim=32, num_heads=2, depth=2, experts=4, top_k=2, expert_hidden=24, num_classes=5)
    with torch.no_grad():
        for parameter in net.blocks[1].mlp.parameters():  # the authors' initial experts are nearly 0
            parameter.normal_(0, 0.2)
    net, image, results = net.to(device).eval(), torch.randn(2, 3, 64, 80).to(device), []
    for backend in ("portable", "fused"):
        with use_backend(backend):
            out = net(image)
            results.append([out, *torch.autograd.grad(out.square().sum(), list(net.parameters()))])
    # A bias of keys shifts all scores of a row equally, so a third of this bias's gradient is only rounding error.
    return max(((a - b).norm() / a.norm().clamp(min=1e-4)).item() for a, b in zip(*results))


def choices():
    """The forms that run on CPU tensors with "auto" and with a named backend, while Triton interprets."""
    why = importlib.import_module(f"{FOLDER}.op").OPERATOR.why
    x, weight, many = torch.zeros(9, 8), torch.zeros(3, 4, 8), torch.zeros(1025, 1, 8)
    return {
        "auto": (why("auto", x, weight).name, why("auto", x, weight).reasons["fused"]),
        "named": why("fused", x, weight).name,
        "double": why("auto", x.double(), weight.double()).reasons["fused"],
        "many": why("auto", x, many).reasons["fused"],
    }
