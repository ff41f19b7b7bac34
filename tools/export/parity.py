"""How far the results of an exported file are from PyTorch's: whole tensors, and detections by matched boxes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RELATIVE_LIMIT = 1e-4
LABEL_LIMIT = 1e-3
OVERLAP_LIMIT = 0.99
SCORE_LIMIT = 1e-3
MISSING_LIMIT = 0.01

DETECTIONS = ("boxes", "scores", "labels")
"""If a file has all these outputs, they are compared by matched boxes, and so are `masks`."""


@dataclass(frozen=True)
class Parity:
    """How far a file's output is from PyTorch's, for one output and one input.

    Attributes:
        output: name of the output.
        source: name of the input it was computed from.
        figure: the difference as one number, 0 for equal results.
        limit: the largest figure that passes.
        exact: whether the output is of integers, such as a label map.
        text: the figure in words; None for whole tensors. Their figure is max |difference| / max |reference|, or for
            integers the share of elements that differ.
        boxes: how many boxes PyTorch found, and the file; None for whole tensors.
    """

    output: str
    source: str
    figure: float
    limit: float
    exact: bool
    text: str | None = None
    boxes: tuple[int, int] | None = None

    @property
    def passed(self) -> bool:
        return self.figure <= self.limit

    @property
    def compared(self) -> bool:
        """Whether there was anything to compare: neither side may have found a box."""
        return self.boxes is None or any(self.boxes)

    def __str__(self) -> str:
        if not self.compared:
            return "no boxes found, nothing to compare"
        if self.text is not None:
            return self.text
        if self.exact:
            return f"{self.figure:.4%} of elements differ (limit {self.limit:.2%})"
        return f"relative error {self.figure:.2e} (limit {self.limit:.0e})"


def compare(
    names: Sequence[str],
    source: str,
    mine: Sequence[Tensor],
    theirs: Sequence[Tensor],
    relative_limit: float = RELATIVE_LIMIT,
    label_limit: float = LABEL_LIMIT,
) -> tuple[Parity, ...]:
    """Compare every output of one run.

    Args:
        names: the names of the outputs.
        source: name of the input.
        mine: PyTorch's outputs.
        theirs: the file's.
        relative_limit: largest max |difference| / max |reference| of real-valued outputs.
        label_limit: largest share of differing elements of integer outputs.

    Returns:
        One figure for each output, in the order of `names`.
    """
    pairs = dict(zip(names, zip(mine, theirs, strict=True), strict=True))
    matched = {}
    if set(DETECTIONS) <= set(names):
        matched = compare_detections({name: pairs[name] for name in (*DETECTIONS, "masks") if name in pairs}, source)
    return tuple(
        matched.get(name) or compare_tensors(name, source, *pair, relative_limit, label_limit)
        for name, pair in pairs.items()
    )


def compare_tensors(
    output: str, source: str, mine: Tensor, theirs: Tensor, relative_limit: float, label_limit: float
) -> Parity:
    """Compare two tensors element by element; another shape, or a NaN, gives an infinite difference."""
    exact = not mine.is_floating_point()
    limit = label_limit if exact else relative_limit
    if mine.shape != theirs.shape:
        return Parity(output, source, float("inf"), limit, exact)
    if not mine.numel():
        return Parity(output, source, 0.0, limit, exact)
    if exact:
        figure = (mine != theirs).double().mean().item()
    else:
        scale = mine.abs().max().item() or 1.0
        figure = (mine.double() - theirs.double()).abs().max().item() / scale
    # Every comparison with NaN is false: it must not pass.
    return Parity(output, source, figure if figure == figure else float("inf"), limit, exact)


def compare_detections(pairs: dict[str, tuple[Tensor, Tensor]], source: str) -> dict[str, Parity]:
    """Compare detections in any order: each box, with its score, label and mask, with the box that overlaps it most.

    Args:
        pairs: PyTorch's and the file's `boxes` (N, 4), `scores` (N), `labels` (N) and perhaps `masks` (N, H, W).
        source: name of the input.
    """
    counts = tuple(len(values) for values in pairs["boxes"])
    overlaps = _overlaps(*pairs["boxes"])
    mine, theirs = _matched(overlaps, pairs["scores"], pairs["labels"])
    found = len(mine)
    shapes_agree = all(a.shape[1:] == b.shape[1:] and len(b) == counts[1] for a, b in pairs.values())
    missing = (1 - found / max(counts) if any(counts) else 0.0) if shapes_agree else 1.0
    lowest = overlaps[mine, theirs].min().item() if found else 0.0

    def parity(output: str, figure: float, limit: float, text: str) -> Parity:
        return Parity(output, source, figure, limit, output in ("labels", "masks"), text, counts)

    spare = f" and {counts[1] - found} more" if counts[1] > found else ""
    results = {
        "boxes": parity(
            "boxes",
            missing,
            MISSING_LIMIT,
            f"{found} of {counts[0]} boxes{spare}, the least overlap {lowest:.5f} (limit {OVERLAP_LIMIT})",
        )
    }
    scores, labels = ([values[index] for values, index in zip(pairs[name], (mine, theirs))] for name in DETECTIONS[1:])
    worst = (scores[0].double() - scores[1].double()).abs().max().item() if found else 0.0
    results["scores"] = parity(
        "scores", worst, SCORE_LIMIT, f"largest difference {worst:.1e} (limit {SCORE_LIMIT:.0e})"
    )
    other = (labels[0] != labels[1]).double().mean().item() if found else 0.0
    results["labels"] = parity("labels", other, LABEL_LIMIT, f"{other:.2%} of labels differ (limit {LABEL_LIMIT:.2%})")
    if "masks" in pairs:
        share = _mask_difference(pairs["masks"][0][mine], pairs["masks"][1][theirs]) if shapes_agree else 1.0
        results["masks"] = parity(
            "masks", share, LABEL_LIMIT, f"{share:.4%} of mask pixels differ (limit {LABEL_LIMIT:.2%})"
        )
    return results


def _matched(overlaps: Tensor, scores: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """As many pairs of boxes as possible that overlap by more than the limit, with similar scores and labels.

    Args:
        overlaps: M x N.
        scores: the scores of the M boxes, and of the N boxes.
        labels: the labels of the M boxes, and of the N boxes.

    Returns:
        Indices into the M, and into the N.
    """
    from scipy.optimize import linear_sum_assignment

    fits = overlaps > OVERLAP_LIMIT
    far = (scores[0].double()[:, None] - scores[1].double()[None]).abs().nan_to_num(1.0).clamp(max=1.0)
    cost = (1 - overlaps) + far + (labels[0][:, None] != labels[1][None]).double()
    rows, columns = map(torch.as_tensor, linear_sum_assignment(torch.where(fits, cost, 1e6).numpy()))
    good = fits[rows, columns]
    return rows[good], columns[good]


def _overlaps(mine: Tensor, theirs: Tensor) -> Tensor:
    """Intersection over union of boxes (M, 4) and (N, 4): M x N. Boxes without area overlap wholly where they agree."""
    mine, theirs = mine.double()[:, None], theirs.double()[None]
    low, high = torch.maximum(mine[..., :2], theirs[..., :2]), torch.minimum(mine[..., 2:], theirs[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    union = (mine[..., 2:] - mine[..., :2]).prod(-1) + (theirs[..., 2:] - theirs[..., :2]).prod(-1) - shared
    same = (mine - theirs).abs().amax(-1) < 1e-2
    return torch.where(union > 0, shared / union, same.double()).nan_to_num(0.0)


def _mask_difference(mine: Tensor, theirs: Tensor) -> float:
    """The share of pixels in either mask of a pair (N, H, W each) that are in only one of the two masks."""
    mine, theirs = mine.bool(), theirs.bool()
    either = (mine | theirs).sum().item()
    return (mine ^ theirs).sum().item() / max(either, 1)
