"""Checks of attentive convolution's Triton kernels. Tests run them in Triton's interpreter, and on a GPU if available.

Functions take and return plain values, because tests call them in a process pool (`tests/kernels/conftest.py`).
"""

import importlib
import math

import torch

from support.triton_common import guarded, limits, poisoned, replaced
from terrazzo.kernels import attentive_conv, use_backend
from terrazzo.tools.bench.operators.attentive_conv import plain

FOLDER = "terrazzo.kernels.attentive_conv"
NAMES = ("out", "x", "value", "weight", "bias", "mixing", "mixing_bias", "inhibition")


def inputs(
    batch, channels, height, width, taps=9, dtype=torch.float64, layout="channels last", x_dtype=None, device="cpu"
):
    """The seven tensors; they require gradients, and NaN surrounds them in memory.

    layout: the layout of both maps: "channels last", "contiguous", "parts" of a wider map, or "turned" (transposed).
    x_dtype: the dtype of x, if it differs.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(device, dtype)

    x, value = drawn(batch, channels, height, width), drawn(batch, channels, height, width)
    weights = [
        drawn(channels, channels) / channels**0.5,
        drawn(channels),
        drawn(taps, taps) / taps**0.5,
        drawn(taps),
        drawn(channels),
    ]
    if layout == "channels last":
        x, value = (guarded(y.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2) for y in (x, value))
    elif layout == "parts":
        x, value = guarded(torch.cat([x, value], 1)).chunk(2, 1)
    elif layout == "turned":
        x, value = (guarded(y.mT.contiguous()).mT for y in (x, value))
    else:
        x, value = guarded(x), guarded(value)
    found = [x.to(x_dtype or dtype), value, *map(guarded, weights)]
    return [y.detach().requires_grad_() for y in found]


def upstream(out):
    """A gradient of the output, random but always the same."""
    return torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)


def run(arguments, backend):
    """The output and all gradients; of a backend, or of PyTorch's layers ("layers")."""
    out = plain(*arguments) if backend == "layers" else attentive_conv(*arguments, backend=backend)
    return [out, *torch.autograd.grad(out, arguments, upstream(out))]


def exact(arguments):
    return run([x.detach().double().requires_grad_() for x in arguments], "reference")


def errors(batch=1, channels=8, height=9, width=7, dtype="float32", device="cpu", **options):
    """The errors of the fused form and their limits: see `triton_common.limits`."""
    arguments = inputs(batch, channels, height, width, dtype=getattr(torch, dtype), device=device, **options)
    wanted, plain = exact(arguments), run(arguments, "layers")
    with poisoned(device):
        found = run(arguments, "fused")
    # The interpreter truncates to bfloat16; a GPU rounds.
    units = {torch.float32: 3, torch.bfloat16: 1} if device == "cpu" else {torch.float32: 3}
    return limits(NAMES, found, plain, wanted, units.items(), sums=("inhibition",))


def splits(parts):
    """The errors if the mean of a bin is computed in parts."""
    with replaced(FOLDER, {"fused._SPLIT": -(-9 * 7 // (9 * parts))}):
        return errors()


def mutated(helper):
    """The largest difference between a result and the reference if a kernel's helper is broken; "" breaks none."""
    module = next(
        (name for name in ("fused_pool", "fused_generate", "fused_convolve") if hasattr(_module(name), helper)), None
    )
    original = getattr(_module(module), helper) if module else None

    def broken(*arguments):
        if helper == "inside":  # the last column counts as outside
            rows, columns, o_c, height, width, channels = arguments
            return original(rows, columns, o_c, height, width - 1, channels)
        if helper == "shift":  # offsets are mirrored
            down, right = original(*arguments)
            return -down, -right
        if helper == "bin_begin":  # bins do not overlap
            number, length, taps = arguments
            return (number * length + taps - 1) // taps
        if helper == "bin_end":
            number, length, taps = arguments
            return (number + 1) * length // taps
        return original(*arguments) * 0.9

    arguments = inputs(1, 8, 10, 7, dtype=torch.float32)
    wanted = exact(arguments)
    with replaced(FOLDER, {f"{module}.{helper}": broken} if helper else {}):
        found = run(arguments, "fused")
    differences = [(a.double() - b).abs().max().item() for a, b in zip(found, wanted)]
    return max(math.inf if math.isnan(x) else x for x in differences)


def _module(name):
    return importlib.import_module(f"{FOLDER}.{name}")


def repeats(dtype="float32", device="cpu"):
    """Whether two runs give the same bits."""
    arguments = inputs(2, 33, 9, 10, dtype=getattr(torch, dtype), device=device)
    first, second = (run(arguments, "fused") for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second))


def opcheck(device="cpu"):
    arguments = inputs(2, 3, 5, 4, dtype=torch.float32, device=device)
    torch.library.opcheck(torch.ops.terrazzo.attentive_conv.default, (*arguments, "fused"))


def compiled(dynamic):
    """The largest difference between compiled and eager outputs and gradients; the graph must not break."""
    function = torch.compile(attentive_conv, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    worst = 0.0
    for height, width in ((9, 7), (6, 11)):
        arguments = inputs(1, 8, height, width, dtype=torch.float32)
        wanted = run(arguments, "fused")
        out = function(*arguments, backend="fused")
        found = [out, *torch.autograd.grad(out, arguments, upstream(out))]
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip(found, wanted)))
    return worst


def model(compile_it, device="cpu", compiler="aot_eager"):
    """The largest relative difference between fused and portable form in a small AttNet: outputs and all gradients."""
    from terrazzo.backbones.attnet import AttNet

    torch.manual_seed(0)
    net = AttNet(depths=(1, 1), dims=(8, 16), expansions=(2, 2), num_classes=5)
    net, image = net.to(device).eval(), torch.randn(2, 3, 44, 37).to(device)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape).to(parameter) * 0.2)
    results = []
    for backend in ("portable", "fused"):
        with use_backend(backend):
            # Compile only the fused form: Dynamo does not guard on the backend, so it would reuse the portable graph.
            compile_now = compile_it and backend == "fused"
            forward = torch.compile(net, fullgraph=True, backend=compiler) if compile_now else net
            out = forward(image)
            results.append([out, *torch.autograd.grad(out.square().sum(), list(net.parameters()))])
    return max(((a - b).norm() / a.norm().clamp(min=1e-6)).item() for a, b in zip(*results))


def mixed(device="cpu"):
    """Errors for bfloat16 `value` with float32 x and weights, as under autocast; dtypes of output and gradients."""
    arguments = inputs(1, 8, 9, 7, dtype=torch.float32, device=device)
    arguments[1] = arguments[1].detach().bfloat16().requires_grad_()
    found, wanted = run(arguments, "fused"), exact(arguments)
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, wanted)]
    return errors, [str(x.dtype) for x in found]


def choices():
    """The forms that run on CPU tensors with "auto" and with a named backend, while Triton interprets."""
    operator = importlib.import_module(f"{FOLDER}.op").OPERATOR
    value = torch.zeros(1, 8, 4, 4)

    def why(backend, value, taps=9):
        return operator.why(backend, value, value, None, None, torch.zeros(taps, taps))

    auto = why("auto", value)
    return {
        "auto": (auto.name, auto.reasons["fused"]),
        "named": why("fused", value).name,
        "double": why("auto", value.double()).reasons["fused"],
        "taps": why("auto", value, 25).reasons["fused"],
    }
