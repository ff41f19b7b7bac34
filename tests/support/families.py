"""A model of each family, for tests that all families share."""

import timm
import torch

from terrazzo.tools import results
from terrazzo.tools.reports import cards


def smallest() -> list[str]:
    """The names of each family's smallest model by parameters."""
    rows = sorted((row.p50, row.what, row.variant) for row in results.read(cards.MODELS) if row.metric == "parameters")
    found = {}
    for _, family, name in rows:
        found.setdefault(family, name)
    return list(found.values())


def kinds() -> list[str]:
    """The smallest model for each layout of maps, kind of unit and kind of output that families have."""
    found = {}
    for name in smallest():
        model = timm.create_model(name, device="meta")
        features = model.forward_features(torch.empty(1, 3, 64, 64, device="meta"))
        found.setdefault((model.output_fmt, model.units_name, features.ndim), name)
    return list(found.values())
