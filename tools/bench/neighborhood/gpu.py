"""The GPU's side of the benchmark of neighborhood attention: shapes, peers, the memory floor, targets.

The memory floor of a forward pass is the time in which the GPU moves query, key, value and output once, at the
bandwidth of a large copy that is measured beside it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from terrazzo.tools import results
from terrazzo.tools.bench.neighborhood import peers
from terrazzo.tools.bench.neighborhood.cases import DENSE_TOKENS, Case, attend
from terrazzo.tools.inspect.timing import FORWARD, TRAINING, Function, Plan, Unavailable, copy_bandwidth

OURS, COPY = "fused", "copy"
PEERS = ("flex", "natten", "portable", "portable compiled", "dense")
FROM_TOKENS = 16_000
_WINDOW = "kernel 7 "


def _square(batch: int, shapes, kernel: int = 7, wider: int = 1) -> list[Case]:
    """Cases of (heads, size, dilation), the size a side or a pair."""
    return [
        Case(batch, (size, size) if isinstance(size, int) else size, wider * heads, (kernel,) * 2, (dilation,) * 2)
        for heads, size, dilation in shapes
    ]


_AT_224 = [(2, 56, 1), (2, 56, 8), (4, 28, 1), (4, 28, 4), (8, 14, 1), (8, 14, 2), (16, 7, 1)]
_AT_384 = [(6, 96, 1), (6, 96, 13), (12, 48, 6), (24, 24, 3), (48, 12, 1)]
_AT_384_KERNEL_11 = [(6, 96, 1), (6, 96, 8), (12, 48, 4), (24, 24, 2)]
_COCO = [
    (2, (200, 320), 1),
    (2, (200, 320), 28),
    (4, (100, 160), 7),
    (4, (100, 160), 14),
    (8, (50, 80), 5),
    (16, (25, 40), 3),
]
_ADE20K = [(2, 128, 1), (2, 128, 16), (4, 64, 8), (8, 32, 4), (16, 16, 2)]
_ODD = [(2, (799, 1201), 1), (2, (799, 1201), 28)]
# Size, kernel, dilation: windows and maps of all proportions.
_AWKWARD = [
    ((17, 19), (9, 7), (1, 2)),
    ((15, 20), (5, 15), (3, 1)),
    ((56, 56), (7, 7), (2, 4)),
    ((28, 46), (11, 13), (1, 1)),
    ((64, 128), (21, 29), (3, 4)),
    ((84, 19), (7, 3), (5, 1)),
    ((19, 29), (8, 8), (2, 3)),
]
_WIDE = Case(1, (256, 256), 24, (80, 80), dim=128, bias=False)  # from an image generator, which has no bias

# One of each kind: a large and a small map, dilated, grid attention, dense prediction, an odd size.
QUICK = [
    *_square(128, [(2, 56, 1), (2, 56, 8), (16, 7, 1)]),
    *_square(2, [(2, (200, 320), 1), (2, (200, 320), 28), (4, 64, 8)]),
    *_square(1, _ODD[:1]),
]
# The Tiny, Base and Large models at 224, 384 and at the sizes of dense prediction. (NATTEN's own profiler takes batch
# 128 with 16 heads on 14 x 14, which is one of the Base model's shapes.)
FULL = [
    *(case for wider in (1, 2, 3) for case in _square(128, _AT_224, wider=wider)),
    *_square(32, _AT_384),
    *_square(32, _AT_384_KERNEL_11, kernel=11),
    *_square(2, _COCO + _ADE20K),
    *_square(1, _ODD),
    *(Case(4, size, 2, kernel, dilation) for size, kernel, dilation in _AWKWARD),
    _WIDE,
]


def cases(quick: bool) -> list[Case]:
    """Cases with a bias; the quick cases also without a bias, which is all that NATTEN computes."""
    plain = [dataclasses.replace(case, bias=False) for case in QUICK]
    if quick:
        return [dataclasses.replace(case, dtype=torch.bfloat16) for case in (*QUICK, *plain[:1], *plain[3:4])]
    return [
        dataclasses.replace(case, dtype=dtype) for dtype in (torch.bfloat16, torch.float16) for case in (*FULL, *plain)
    ]


def forms(case: Case, inputs: list[torch.Tensor], training: bool, plan: Plan) -> dict[str, Function]:
    """The forms by name: each computes the output of these inputs, or raises an error that says what it lacks."""
    if plan.compiles:
        torch.compiler.reset()  # otherwise a peer would run uncompiled after as many shapes as Dynamo caches
    found = {
        OURS: partial(attend, case, "fused", *inputs),
        "flex": _flex(case, inputs, plan),
        "portable": partial(attend, case, "portable", *inputs),
    }
    if plan.compiles and _is_quick(case):
        found["portable compiled"] = _compiled(case, inputs)
    if case.window.tokens <= DENSE_TOKENS:
        found["dense"] = _dense(case, inputs, training)
    if not case.bias:
        found |= {f"natten {name}": partial(peers.natten, *inputs, case.window, name) for name in peers.NATTEN}
    return found


def _is_quick(case: Case) -> bool:
    """Whether to compile the portable form, which takes longest and is done for some shapes only."""
    return case.dtype == torch.bfloat16 and dataclasses.replace(case, dtype=torch.float32) in QUICK


def _compiled(case: Case, inputs: list[torch.Tensor]) -> Function:
    """The exported form, compiled: standard operations, not one opaque op."""
    from terrazzo.kernels.neighborhood_attention import exported

    kernel, dilation, scale = case.kernel, case.dilation, case.dim**-0.5

    @partial(torch.compile, dynamic=False)
    def attend(query, key, value, rpb=None):
        return exported.forward(query, key, value, rpb, kernel, dilation, scale)

    return partial(attend, *inputs)


def _flex(case: Case, inputs: list[torch.Tensor], plan: Plan) -> Function:
    from torch.nn.attention.flex_attention import flex_attention

    function = torch.compile(flex_attention, dynamic=False) if plan.compiles else flex_attention
    query, key, value, *tables = inputs
    score_mod = peers.flex_bias(case.window, *tables) if tables else None
    blocks = None

    def run() -> torch.Tensor:
        nonlocal blocks
        if not plan.compiles and case.window.tokens > DENSE_TOKENS:
            raise Unavailable("without torch.compile it holds all pairs of tokens")
        if blocks is None:  # made once, as a model would
            blocks = peers.flex_blocks(case.window, query.device)
        return peers.flex(query, key, value, function, blocks, score_mod)

    return run


def _dense(case: Case, inputs: list[torch.Tensor], training: bool) -> Function:
    """Dense attention; its mask is made once for inference, and each time if the bias learns."""
    query, key, value, *tables = inputs
    rpb = tables[0] if tables else torch.zeros(case.heads, *(2 * k - 1 for k in case.kernel), device=query.device)
    ready = None

    def run() -> torch.Tensor:
        nonlocal ready
        mask = ready
        if mask is None:
            mask = peers.dense_mask(rpb, case.window, query.dtype)
            ready = None if training and tables else mask
        return peers.dense(query, key, value, mask)

    return run


def bandwidth(row: Callable[..., results.Row], device: torch.device) -> results.Row:
    """What a large copy reads and writes per second, measured now."""
    return row(COPY, "copy bandwidth", "GB/s", (x / 1e9 for x in copy_bandwidth(device)))


def is_gpu(rows: list[results.Row]) -> bool:
    """Whether rows belong to this side of the benchmark."""
    return any(row.backend == COPY for row in rows)


@dataclasses.dataclass(frozen=True)
class _Measured:
    """The times of one pass over one case in milliseconds, by form; `natten` is the fastest of its backends."""

    shape: str
    variant: str
    dtype: str
    metric: str
    times: dict[str, float]
    floor: float  # ms, of a forward pass

    def __str__(self) -> str:
        return f"{self.shape}, {self.variant}, {self.dtype}"

    @property
    def tokens(self) -> int:
        return math.prod(map(int, self.shape.split("x")[:3]))

    def slower(self, peer: str) -> float | None:
        """The ratio of a peer's time to ours."""
        ours, theirs = self.times.get(OURS), self.times.get(peer)
        return None if ours is None or theirs is None else theirs / ours


def _measured(rows: list[results.Row]) -> Iterator[_Measured]:
    groups: dict[tuple[str, ...], dict[str, float]] = {}
    speeds = {}
    for row in rows:
        case = (row.shape, row.variant, row.dtype)
        if row.backend == COPY:
            speeds[case] = row.p50 * 1e9
        else:
            groups.setdefault((*case, row.metric), {})[row.backend] = row.p50
    for key, times in groups.items():
        best = [time for name, time in times.items() if name.startswith("natten ")]
        times = {**times, "natten": min(best)} if best else times
        elements = math.prod(map(int, key[0].split("x")))
        floor = 1e3 * 4 * elements * getattr(torch, key[2]).itemsize / speeds[key[:3]]
        yield _Measured(*key, times, floor)


def table(rows: list[results.Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines: the fused form's time, times its floor, and how many times as long its peers take."""
    lines = []
    for found in _measured(rows):
        ours = found.times.get(OURS)
        floor = results.ratio(ours, found.floor) if found.metric == FORWARD else ""
        ratios = (results.ratio(found.times.get(peer), ours) for peer in PEERS)
        lines.append((str(found), found.metric, results.milliseconds(ours, 3), floor, *ratios))
    head = ("B x H x W x heads x dim", "pass", "fused, ms", "of its floor", *(f"{peer} takes" for peer in PEERS))
    return head, lines


def promises(rows: list[results.Row]) -> Iterator[tuple[str, dict[str, float], float, bool, str]]:
    """The ratios that have a target: arguments of `verdict`."""
    found = list(_measured(rows))
    ours = {(str(one), one.metric): one.times[OURS] for one in found if OURS in one.times}
    large = [one for one in found if one.tokens >= FROM_TOKENS and one.variant.startswith(_WINDOW)]
    forward = {str(one): one for one in large if one.metric == FORWARD and OURS in one.times}
    floors = {name: one.times[OURS] / one.floor for name, one in forward.items()}
    yield f"forward, kernel 7, from {FROM_TOKENS} tokens on", floors, 4, True, "x the memory floor"
    backward = {
        name: ours[name, TRAINING] / one.times[OURS] - 1 for name, one in forward.items() if (name, TRAINING) in ours
    }
    yield f"backward, kernel 7, from {FROM_TOKENS} tokens on", backward, 3, True, "x forward"
    for peer, target in (("flex", 2), ("natten", 1)):
        ratios = {f"{one}, {one.metric}": ratio for one in found if (ratio := one.slower(peer)) is not None}
        name = {"flex": "FlexAttention", "natten": "NATTEN's best backend"}[peer]
        yield f"{name} takes", ratios, target, False, "x our time"
