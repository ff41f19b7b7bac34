"""How well a readout tells pairs of one object from pairs of two."""

import math

import torch
from torch import Tensor, nn

from terrazzo.tools.probe.objects.readouts import Sampled

AUC, ACCURACY, BALANCED, SHARE, PRIOR = "AUC", "accuracy", "balanced accuracy", "pairs of one object", "class prior"
INSIDE = "AUC inside of categories"
BANDS = ((0, 2), (2, 4), (4, 8), (8, math.inf))
"""Distances of two positions in cells: more than the first number, up to the second."""


def band_name(band: tuple[float, float]) -> str:
    """The metric's name of a band of distances."""
    low, high = band
    return f"AUC beyond {low} cells" if math.isinf(high) else f"AUC from {low} to {high} cells"


@torch.inference_mode()
def scores(readout: nn.Module, data: Sampled) -> dict[str, float]:
    """Metrics in percent over all pairs; a metric without pairs of both kinds is left out.

    `INSIDE` compares pairs of one object with pairs of two objects of one category: these pairs alone show that
    objects, and not categories, are told apart.
    """
    counts, same = data.pairs()
    logits = readout(data.features)[counts]
    wanted = same[counts]
    categories = (data.categories[:, :, None] == data.categories[:, None])[counts]
    apart = torch.cdist(data.places.float(), data.places.float())[counts]
    share = wanted.float().mean().item()
    right = (logits > 0) == wanted
    found = {
        ACCURACY: right.float().mean().item(),
        BALANCED: (right[wanted].float().mean().item() + right[~wanted].float().mean().item()) / 2,
        SHARE: share,
        PRIOR: max(share, 1 - share),
        AUC: _auc(logits, wanted),
        INSIDE: _auc(logits[categories], wanted[categories]),
    }
    for low, high in BANDS:
        near = (apart > low) & (apart <= high)
        found[band_name((low, high))] = _auc(logits[near], wanted[near])
    return {name: 100 * value for name, value in found.items() if not math.isnan(value)}


def _auc(logits: Tensor, wanted: Tensor) -> float:
    """The area under the ROC curve; NaN without pairs of both kinds."""
    from torchmetrics.functional.classification import binary_auroc

    if not wanted.any() or wanted.all():
        return math.nan
    # Ranks, because torchmetrics takes the sigmoid of logits, and in single precision that makes large ones equal.
    ranks = logits.double().unique(return_inverse=True)[1].double()
    return binary_auroc(ranks / ranks.max().clamp(min=1), wanted.long()).item()
