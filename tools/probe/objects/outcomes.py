"""What the readouts found, as a table, as rows and as curves over depth."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from terrazzo.tools import results
from terrazzo.tools.probe.objects.scores import ACCURACY, AUC, BALANCED, INSIDE

WHAT = "object binding"
TRAIN = "AUC on train"
RANDOM = "random weights"
_SHOWN = (AUC, TRAIN, INSIDE, BALANCED, ACCURACY)


@dataclass(frozen=True)
class Outcome:
    """The metrics of one readout, in percent.

    Attributes:
        form: of the model, such as "dense"; or a control.
        level: number of the block or stage; None for a control.
        depth: the level from 0 to 1.
        grid: (h, w) of the cells.
        readout: its name.
        metrics: by name.
    """

    form: str
    level: int | None
    depth: float
    grid: tuple[int, int]
    readout: str
    metrics: dict[str, float] = field(default_factory=dict)


def gain(outcome: Outcome, outcomes: Sequence[Outcome]) -> float | None:
    """The AUC above that of the best control on the same grid, with any readout; None for controls."""
    if _is_control(outcome):
        return None
    controls = [x.metrics[AUC] for x in outcomes if x.grid == outcome.grid and _is_control(x)]
    return outcome.metrics[AUC] - max(controls, default=50.0)


def _is_control(outcome: Outcome) -> bool:
    return outcome.level is None or outcome.form == RANDOM


def best(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Of each form and readout on each grid, the level with the highest AUC."""
    found: dict[tuple[str, str, tuple[int, int]], Outcome] = {}
    for outcome in outcomes:
        key = (outcome.form, outcome.readout, outcome.grid)
        if key not in found or outcome.metrics[AUC] > found[key].metrics[AUC]:
            found[key] = outcome
    return list(found.values())


def table(
    shown: Sequence[Outcome], outcomes: Sequence[Outcome] | None = None
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines.

    Args:
        shown: the outcomes to show.
        outcomes: all, among which the controls are; by default those that are shown.
    """
    lines = []
    for outcome in shown:
        found = gain(outcome, shown if outcomes is None else outcomes)
        lines.append(
            (
                outcome.form,
                "" if outcome.level is None else str(outcome.level),
                "x".join(map(str, outcome.grid)),
                outcome.readout,
                *(f"{outcome.metrics[metric]:.1f}" if metric in outcome.metrics else "" for metric in _SHOWN),
                "" if found is None else f"{found:+.1f}",
            )
        )
    return ("features", "level", "grid", "readout", *_SHOWN, "AUC to best control"), lines


def rows_of(
    model: str, shape: str, outcomes: Sequence[Outcome], seed: int, about: tuple[str, str, str]
) -> list[results.Row]:
    """A row for each figure; the column `backend` says what was read out."""
    rows = []
    for outcome in outcomes:
        level = "" if outcome.level is None else f", level {outcome.level}"
        where = f"{outcome.form}{level}, {outcome.grid[0]}x{outcome.grid[1]}, {outcome.readout}, seed {seed}"
        for metric, value in outcome.metrics.items():
            rows.append(results.Row(WHAT, model, shape, "float32", where, metric, "%", value, value, value, *about))
    return rows


def outcomes_of(rows: Sequence[results.Row]) -> list[Outcome]:
    """The outcomes that `rows_of` made rows of; depths are relative to the highest level that was measured."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row.backend, {})[row.metric] = row.p50
    outcomes = []
    for where, metrics in found.items():
        *form, grid, readout, _ = where.split(", ")
        level = int(form.pop().removeprefix("level ")) if form[-1].startswith("level ") else None
        height, width = (int(side) for side in grid.split("x"))
        outcomes.append(Outcome(", ".join(form), level, 0.0, (height, width), readout, metrics))
    count = 1 + max((x.level for x in outcomes if x.level is not None), default=0)
    return [replace(x, depth=0 if x.level is None else (x.level + 1) / count) for x in outcomes]


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """AUC over depth, a curve for each form and readout; controls are level lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    names = dict.fromkeys((outcome.form, outcome.readout, outcome.grid) for outcome in outcomes)
    for index, (form, readout, grid) in enumerate(names):
        found = [x for x in outcomes if (x.form, x.readout, x.grid) == (form, readout, grid)]
        label = f"{form}, {readout}, {grid[0]}x{grid[1]}"
        if found[0].level is None:
            axes.axhline(found[0].metrics[AUC], color=f"C{index % 10}", linestyle="--", label=label)
        else:
            depths, values = [x.depth for x in found], [x.metrics[AUC] for x in found]
            axes.plot(depths, values, marker=".", color=f"C{index % 10}", label=label)
    axes.set(xlabel="depth", ylabel=f"{AUC}, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
