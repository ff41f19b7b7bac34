"""One model of each family, for tests that are the same for all."""

from terrazzo.tools import results
from terrazzo.tools.reports import cards


def smallest() -> list[str]:
    """Of each family the model with the fewest parameters."""
    rows = sorted((row.p50, row.what, row.variant) for row in results.read(cards.MODELS) if row.metric == "parameters")
    found = {}
    for _, family, name in rows:
        found.setdefault(family, name)
    return list(found.values())
