"""Sentences that compare measured ratios with targets."""

from collections.abc import Mapping


def verdict(what: str, ratios: Mapping[str, float], target: float, most: bool, unit: str) -> str:
    """One line: the range found, the target, and where it is met.

    Args:
        what: what is compared.
        ratios: the ratio of each case, by its name.
        target: a bound for each ratio.
        most: whether it bounds from above.
        unit: the unit of the ratios, such as "x floor".
    """
    bound = f"target at {'most' if most else 'least'} {target:g}"
    if not ratios:
        return f"{what}: not measured; {bound}"
    low, high = (f"{value:.2f}" for value in (min(ratios.values()), max(ratios.values())))
    found = f"{low} {unit}" if low == high else f"{low} to {high} {unit}"
    missed = {case: ratio for case, ratio in ratios.items() if (ratio > target if most else ratio < target)}
    cases = f"{len(ratios)} cases" if len(ratios) > 1 else next(iter(ratios))
    if not missed:
        return f"{what}: {found} ({cases}); {bound}: met"
    if len(ratios) == 1:
        return f"{what}: {found} ({cases}); {bound}: missed"
    worst = (max if most else min)(missed, key=missed.get)
    return f"{what}: {found} ({cases}); {bound}: missed in {len(missed)}, worst on {worst}"
