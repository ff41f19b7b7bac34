"""Sentences that hold measured ratios against what is promised."""

from collections.abc import Mapping


def verdict(what: str, ratios: Mapping[str, float], target: float, most: bool, unit: str) -> str:
    """One line: the range found, the target, and whether it is met everywhere or where not.

    Args:
        what: what is compared.
        ratios: by the case on which each was found.
        target: a bound of each of them.
        most: whether it bounds from above.
        unit: what the ratios are of, such as "x floor".
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
