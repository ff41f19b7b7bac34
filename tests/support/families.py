"""A model of each family, for tests that all families share."""

from terrazzo.tools import results
from terrazzo.tools.reports import cards


def smallest() -> list[str]:
    """The names of each family's smallest model by parameters."""
    rows = sorted((row.p50, row.what, row.variant) for row in results.read(cards.MODELS) if row.metric == "parameters")
    found = {}
    for _, family, name in rows:
        found.setdefault(family, name)
    return list(found.values())
