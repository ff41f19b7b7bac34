"""Checks of varlen attention's Triton kernels. Tests run them in Triton's interpreter, and on a GPU if available.

Functions take and return plain values, because tests call them in a process pool (`tests/kernels/conftest.py`).
"""

import importlib
import math

import torch

from support.triton_common import guarded, limits, poisoned, replaced
from terrazzo.kernels import use_backend, varlen_attention

FOLDER = "terrazzo.kernels.varlen_attention"
NAMES = ("out", "query", "key", "value")


def inputs(lengths, heads, dim, dtype=torch.float64, layout="packed", device="cpu"):
    """Query, key and value that require gradients, surrounded by NaN, and cu_seqlens.

    layout: "packed" (views of one tensor, as a projection gives them), "plain", or "turned" (the last axis is not
    contiguous).
    """
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, heads, dim, dtype=torch.float64, generator=generator).to(device, dtype)
    found = list(guarded(qkv).unbind(1))
    if layout == "plain":
        found = [guarded(x.contiguous()) for x in found]
    elif layout == "turned":
        found = [guarded(x.transpose(1, 2).contiguous()).transpose(1, 2) for x in found]
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    return [x.detach().requires_grad_() for x in found], cu_seqlens


def run(arguments, cu_seqlens, backend, max_seqlen=None):
    """The output and all gradients."""
    out = varlen_attention(*arguments, cu_seqlens, max_seqlen, backend=backend)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, arguments, grad)]


def exact(arguments, cu_seqlens):
    return run([x.detach().double().requires_grad_() for x in arguments], cu_seqlens, "reference")


def errors(lengths=(5, 1, 33), heads=2, dim=8, dtype="float32", layout="packed", max_seqlen=None, device="cpu"):
    """The errors of the fused form and their limits: see `triton_common.limits`."""
    arguments, cu_seqlens = inputs(lengths, heads, dim, getattr(torch, dtype), layout, device)
    wanted, plain = exact(arguments, cu_seqlens), run(arguments, cu_seqlens, "reference")
    with poisoned(device):
        found = run(arguments, cu_seqlens, "fused", max_seqlen)
    # The interpreter truncates to bfloat16; a GPU rounds.
    return limits(NAMES, found, plain, wanted, {torch.float32: 3, torch.bfloat16: 1, torch.float16: 1}.items())


def alone(lengths=(7, 70, 1, 33), dtype="float32", device="cpu"):
    """Whether the output and gradients of every sequence equal, to the bit, its results alone."""
    arguments, cu_seqlens = inputs(lengths, 2, 8, getattr(torch, dtype), device=device)
    together = run(arguments, cu_seqlens, "fused")
    grad = torch.randn(together[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    same = True
    for begin, end in zip(cu_seqlens.tolist(), cu_seqlens[1:].tolist()):
        own = [x.detach()[begin:end].requires_grad_() for x in arguments]
        out = varlen_attention(*own, torch.tensor([0, end - begin], device=device), backend="fused")
        found = [out, *torch.autograd.grad(out, own, grad[begin:end].to(out))]
        same &= all(torch.equal(a, b[begin:end]) for a, b in zip(found, together))
    return same


def repeats(dtype="float32", device="cpu"):
    """Whether two runs give the same bits."""
    arguments, cu_seqlens = inputs((40, 3, 130), 2, 8, getattr(torch, dtype), device=device)
    return all(torch.equal(a, b) for a, b in zip(*(run(arguments, cu_seqlens, "fused") for _ in range(2))))


def large_scores(magnitude, dtype, device="cpu"):
    """The relative error of the output for large scores; infinity if a result is not finite."""
    arguments, cu_seqlens = inputs((40, 9), 1, 8, torch.float32, device=device)
    arguments = [x.detach() * scale for x, scale in zip(arguments, (magnitude, magnitude, 1))]
    arguments = [x.to(getattr(torch, dtype)).requires_grad_() for x in arguments]
    found, wanted = run(arguments, cu_seqlens, "fused"), exact(arguments, cu_seqlens)
    if not all(x.isfinite().all() for x in found):
        return math.inf
    return ((found[0].double() - wanted[0]).norm() / wanted[0].norm()).item()


def mutated(helper):
    """The largest difference between a result and the reference if a kernel's helper is broken; "" breaks none."""
    changes = {}
    if helper:
        original = getattr(importlib.import_module(f"{FOLDER}.fused_kernels"), helper)

        def broken(*arguments, **options):
            found = original(*arguments, **options)
            if helper == "locate":  # a sequence loses its last token
                return found[0], found[1] - 1, *found[2:]
            if helper == "softmax_step":  # the running sum is not rescaled
                return found[0], found[1] * 0 + 1, *found[2:]
            return found * 0 if helper == "packed" else found * 1.5

        changes[f"fused_kernels.{helper}"] = broken
    arguments, cu_seqlens = inputs((40, 9, 70), 2, 8, torch.float32)
    wanted = exact(arguments, cu_seqlens)
    with replaced(FOLDER, changes), poisoned():
        found = run(arguments, cu_seqlens, "fused")
    differences = [(a.double() - b).abs().max().item() for a, b in zip(found, wanted)]
    return max(math.inf if math.isnan(x) else x for x in differences)


def opcheck(device="cpu"):
    arguments, cu_seqlens = inputs((9, 1, 20), 2, 8, torch.float32, device=device)
    torch.library.opcheck(torch.ops.terrazzo.varlen_attention.default, (*arguments, cu_seqlens, 20))


def compiled():
    """The largest difference between compiled and eager outputs and gradients; the graph must not break."""
    function = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    worst = 0.0
    for lengths in ((33, 5), (40, 11, 3)):
        arguments, cu_seqlens = inputs(lengths, 2, 8, torch.float32)
        wanted = run(arguments, cu_seqlens, "fused", 40)
        out = function(*arguments, cu_seqlens, 40, backend="fused")
        grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
        found = [out, *torch.autograd.grad(out, arguments, grad)]
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip(found, wanted)))
    return worst


def model(device="cpu"):
    """The largest relative difference between fused and portable form in a small packed AS-ViT: outputs, gradients."""
    from terrazzo.backbones.asvit import ASViT

    torch.manual_seed(0)
    net = ASViT(blocks=(1, 2), form="packed", depth=4, embed_dim=32, num_heads=2, num_classes=5).to(device).eval()
    with torch.no_grad():
        for threshold, value in zip(net.reducer.thresholds, (0.0322, 0.06)):
            threshold.fill_(value)
    image, results = torch.randn(3, 3, 96, 80).to(device), []
    parameters = [p for name, p in net.named_parameters() if "threshold" not in name]
    for backend in ("portable", "fused"):
        with use_backend(backend):
            maps = net.forward_intermediates(image, intermediates_only=True)
            out = net(image)
            results.append([*maps, out, *torch.autograd.grad(out.square().sum(), parameters)])
    x, state = net.begin(image)
    for block in net.blocks:
        x = net.run_unit(block, x, state)
    assert len(set(state.lengths)) > 1, "all images keep the same number: this proves nothing"
    return max(((a - b).norm() / a.norm().clamp(min=1e-4)).item() for a, b in zip(*results))


def empty(device="cpu"):
    """The shapes of results without any sequence, and the results if some sequences are empty."""
    shapes = []
    for lengths in ((), (0, 0)):
        arguments, cu_seqlens = inputs(lengths, 2, 8, torch.float32, device=device)
        shapes.append([tuple(x.shape) for x in run(arguments, cu_seqlens, "fused")])
    arguments, cu_seqlens = inputs((0, 5, 0), 2, 8, torch.float32, device=device)
    found, wanted = run(arguments, cu_seqlens, "fused"), exact(arguments, cu_seqlens)
    return shapes, max((a - b).abs().max().item() for a, b in zip(found, wanted))


def choices():
    """The forms that run on CPU tensors with "auto" and with a named backend, while Triton interprets."""
    why = importlib.import_module(f"{FOLDER}.op").OPERATOR.why
    x = torch.zeros(9, 1, 8)
    return {
        "auto": (why("auto", x).name, why("auto", x).reasons["fused"]),
        "named": why("fused", x).name,
        "double": why("auto", x.double()).reasons["fused"],
        "wide": why("auto", torch.zeros(9, 1, 136)).reasons["fused"],
    }
