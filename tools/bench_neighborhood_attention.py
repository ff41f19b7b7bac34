"""The portable form of neighborhood attention against gathering the windows and against dense masked attention."""

import importlib

import click
import torch
import torch.nn.functional as F

from terrazzo.kernels import neighborhood_attention
from terrazzo.tools import results

reference = importlib.import_module("terrazzo.kernels.neighborhood_attention.reference")

# heads, side, dilation: the maps of DiNAT-Tiny at 224 and of a segmentor at 512; kernel 7, head dimension 32, batch 1.
SHAPES = [(2, 56, 1), (2, 56, 8), (4, 28, 1), (8, 14, 1), (2, 128, 1), (2, 128, 16), (4, 64, 1)]
KERNEL, DIM = 7, 32
# Dense attention needs a table of tokens squared per head; past this it is left out, and the table says so.
DENSE_TOKENS = 64 * 64


def _dense(query, key, value, rpb, dilation):
    """What a user without the operator would write: one dense attention with a masked bias, made each time."""
    batch, height, width, heads, dim = query.shape
    (rows, row_offsets), (columns, column_offsets) = (
        reference.axis_neighbors(side, KERNEL, dilation) for side in (height, width)
    )
    flat = (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten(2).flatten(0, 1)
    offset = (
        (row_offsets[:, None, :, None] * (2 * KERNEL - 1) + column_offsets[None, :, None, :]).flatten(2).flatten(0, 1)
    )
    mask = query.new_full((heads, height * width, height * width), float("-inf"))
    mask = mask.scatter(2, flat.expand(heads, -1, -1), rpb.flatten(1)[:, offset])
    query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    return (
        F.scaled_dot_product_attention(query, key, value, mask)
        .transpose(1, 2)
        .reshape(batch, height, width, heads, dim)
    )


def _peers(heads: int, side: int, dilation: int):
    """The forms by name: forward alone, and forward and backward."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, side, side, heads, DIM, requires_grad=True) for _ in range(3))
    rpb = torch.randn(heads, 2 * KERNEL - 1, 2 * KERNEL - 1, requires_grad=True)
    forms = {
        "portable": lambda: neighborhood_attention(query, key, value, KERNEL, dilation, rpb, backend="portable"),
        "gather": lambda: neighborhood_attention(query, key, value, KERNEL, dilation, rpb, backend="reference"),
    }
    if side * side <= DENSE_TOKENS:
        forms["dense"] = lambda: _dense(query, key, value, rpb, dilation)
    grad = torch.randn(1, side, side, heads, DIM)
    inputs = (query, key, value, rpb)
    return forms, {name: lambda form=form: torch.autograd.grad(form(), inputs, grad) for name, form in forms.items()}


def run(seconds: float) -> list[results.Row]:
    """Time every form on every shape, forward alone and with backward."""
    rows = []
    about = (results.device_name(), results.versions(), results.commit())
    with click.progressbar(SHAPES, label="neighborhood_attention", item_show_func=str) as shapes:
        for heads, side, dilation in shapes:
            forward_forms, both_forms = _peers(heads, side, dilation)
            with torch.no_grad():
                forward = results.interleaved(forward_forms, seconds)
            both = results.interleaved(both_forms, seconds)
            for metric, times in (("forward", forward), ("forward+backward", both)):
                rows += [
                    results.Row(
                        "neighborhood_attention",
                        f"kernel {KERNEL} dilation {dilation}",
                        f"1x{side}x{side}x{heads}x{DIM}",
                        "float32",
                        name,
                        metric,
                        "ms",
                        *(1e3 * t for t in times[name]),
                        *about,
                    )
                    for name in times
                ]
    return rows


def table(rows: list[results.Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines: the portable form's time, and how many times as long its peers take."""
    lines = []
    times = {(row.shape, row.variant, row.metric, row.backend): row.p50 for row in rows}
    for shape, variant, metric in dict.fromkeys(key[:3] for key in times):
        ours = times[shape, variant, metric, "portable"]
        ratios = (times.get((shape, variant, metric, peer)) for peer in ("gather", "dense"))
        lines.append(
            (
                f"{shape}, {variant}",
                metric,
                f"{ours:.2f}",
                *("not run" if r is None else f"{r / ours:.1f} x" for r in ratios),
            )
        )
    return ("B x H x W x heads x dim", "pass", "portable, ms", "gather takes", "dense takes"), lines
