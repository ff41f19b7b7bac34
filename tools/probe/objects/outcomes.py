"""What the readouts found, as a table, as rows and as curves over depth."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from terrazzo.tools import results
from terrazzo.tools.probe.objects.scores import ACCURACY, AUC, BALANCED, INSIDE

WHAT = "object binding"
TRAIN = "AUC on train"


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
    """The AUC above that of the best control with the same readout and grid; None for controls."""
    if outcome.level is None or outcome.form.startswith("random"):
        return None
    alike = [
        other
        for other in outcomes
        if (other.readout, other.grid) == (outcome.readout, outcome.grid)
        and (other.level is None or (other.form.startswith("random") and other.level == outcome.level))
    ]
    return outcome.metrics[AUC] - max((other.metrics[AUC] for other in alike), default=50.0)


def table(outcomes: Sequence[Outcome]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines, in the order of the outcomes."""
    lines = []
    for outcome in outcomes:
        found = gain(outcome, outcomes)
        lines.append(
            (
                outcome.form,
                "" if outcome.level is None else str(outcome.level),
                "x".join(map(str, outcome.grid)),
                outcome.readout,
                *(
                    f"{outcome.metrics[m]:.1f}" if m in outcome.metrics else ""
                    for m in (AUC, INSIDE, BALANCED, ACCURACY)
                ),
                "" if found is None else f"{found:+.1f}",
            )
        )
    head = ("features", "level", "grid", "readout", AUC, INSIDE, BALANCED, ACCURACY, "AUC to best control")
    return head, lines


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
