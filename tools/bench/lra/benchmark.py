"""`terrazzo bench lra`: accuracy of every mixer on tasks of Long Range Arena that can be made up."""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch
from rich.progress import Progress

from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.bench.lra.hosts import Entry, entries
from terrazzo.tools.bench.lra.tasks import Split, Task, task
from terrazzo.tools.bench.lra.training import Budget, evaluate, train
from terrazzo.tools.console import human, print_table, progress, steps
from terrazzo.tools.files import check_folder, check_output_file
from terrazzo.tools.inspect.timing import reason_of
from terrazzo.tools.options import POSITIVE, UserPath, device_option
from terrazzo.tools.targets import pick_device

WHAT, STEPS, PARAMETERS = "lra", "steps", "parameters"


@click.command()
@click.argument("name", metavar="TASK")
@click.option("--mixer", "mixers", multiple=True, metavar="NAME[,KEY=VALUE...]", help="A mixer in the ViT; repeatable.")
@click.option(
    "--stages", multiple=True, metavar="NAME,NAME,NAME,NAME", help="Mixers of the pyramid's four stages; repeatable."
)
@click.option(
    "--seconds",
    type=POSITIVE,
    default=60.0,
    show_default=True,
    help="Time of training for each network.",
)
@click.option("--train", "count", type=click.IntRange(min=1), default=2000, show_default=True, help="Examples.")
@click.option("--test", "held", type=click.IntRange(min=1), default=500, show_default=True, help="Examples held out.")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Examples of a step.")
@click.option(
    "--patch", type=click.IntRange(min=1), default=1, show_default=True, help="Side of the ViT's patches in pixels."
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of everything.")
@click.option(
    "--data",
    "root",
    type=UserPath(),
    metavar="DIR",
    help="Folder that keeps the images [default: data/lra/TASK-TRAIN-TEST-seedSEED].",
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes for images [default: 1].")
@device_option
@click.option("--out", type=UserPath(), metavar="FILE.csv", help="Write the rows as CSV, after every network.")
def command(
    name: str,
    mixers: tuple[str, ...],
    stages: tuple[str, ...],
    seconds: float,
    count: int,
    held: int,
    batch: int,
    patch: int,
    seed: int,
    root: Path | None,
    workers: int | None,
    device: str | None,
    out: Path | None,
) -> None:
    """Train every mixer on TASK with one recipe and for one time, and score it on training data and on held-out data.

    TASK is pathfinder32, pathfinder64, pathfinder128 or pathfinder256 (are both discs on one contour?), paths64,
    paths128 or paths256 (which pixels are on the contour of the discs?), or listops. Without --mixer and --stages, all
    mixers run in a plain ViT of 4 layers and 64 channels, and on images also in the first two stages of a small
    pyramid. The figures compare mixers with each other: published figures of Long Range Arena have other sizes, other
    recipes for each model and far longer training.
    """
    chosen = task(name)
    for option, value in (("--data", root), ("--workers", workers)):
        if chosen.sequence and value is not None:
            raise click.UsageError(f"{option} is for tasks with images, and {name} has none")
    found = entries(mixers, stages, chosen)
    if mixers or stages:
        for entry in found:
            entry.check(chosen, patch)
    where = pick_device(device)
    if out is not None:
        check_output_file(out)
    if not chosen.sequence:
        root = check_folder(root or Path("data", "lra", f"{name}-{count}-{held}-seed{seed}"))
    with steps("data", count + held) as done:
        training, test = chosen.load(root, count, held, seed, workers or 1, done)
    budget = Budget(seconds, batch, seed)
    about = results.about(where, "timm")
    rows: list[results.Row] = []
    reasons: dict[str, str] = {}
    with progress(name, len(found)) as bar:
        for number, entry in enumerate(found):
            bar.update(bar.task_ids[0], description=entry.name, completed=number)
            try:
                figures = _measure(entry, chosen, patch, (training, test), budget, where, partial(_show, bar, number))
            except Exception as error:  # whatever goes wrong, other networks are measured
                reasons[entry.name] = reason_of(error)
                gc.collect()
                continue
            shape = f"{batch}x{chosen.channels}x{chosen.grid[0]}x{chosen.grid[1]}"
            rows += [
                results.Row(WHAT, name, shape, "float32", entry.name, metric, unit, *(value,) * 3, *about)
                for (metric, unit), value in figures.items()
            ]
            if out is not None:
                results.write(out, rows)
    if not rows:
        what, reason = next(iter(reasons.items()))
        raise InputError(f"no network could be measured; {what}: {reason}")
    head, lines = table(rows)
    print_table(lines, head, right=tuple(range(1, len(head))))
    click.echo(
        f"{about[0]}; {about[1]}; {seconds:g} s of training each on {count} examples, batch {batch}, scored on "
        f"{min(count, held)} of them and on {held} others; chance is {chosen.chance:g}"
    )
    for what, reason in reasons.items():
        click.echo(f"not run: {what}: {reason}")
    if out is not None:
        click.echo(f"wrote {out}")


def _show(bar: Progress, number: int, part: float) -> None:
    """Move the bar to the part of the time of a network that has passed."""
    bar.update(bar.task_ids[0], completed=number + part)


def _measure(
    entry: Entry,
    chosen: Task,
    patch: int,
    data: tuple[Split, Split],
    budget: Budget,
    where: torch.device,
    told: Callable[[float], None],
) -> dict[tuple[str, str], float]:
    """The figures of a network by metric and unit."""
    torch.manual_seed(budget.seed)
    network = entry.build(chosen, patch).to(where)
    count = train(network, chosen, data[0], budget, where, told)
    figures = {
        (PARAMETERS, "1"): float(sum(parameter.numel() for parameter in network.parameters())),
        (STEPS, "1"): float(count),
    }
    for split, part in (("train", data[0].first(len(data[1].targets))), ("test", data[1])):
        scores = evaluate(network, chosen, part, budget.batch, where)
        figures |= {(f"{split} {metric}", "%"): value for metric, value in scores.items()}
    return figures


def table(rows: list[results.Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines, a line for each network, the best on held-out data first."""
    figures = {(row.backend, row.metric): row.p50 for row in rows}
    metrics = [metric for metric in dict.fromkeys(row.metric for row in rows) if metric not in (PARAMETERS, STEPS)]
    (best, *_) = (metric for metric in metrics if metric.startswith("test"))
    names = sorted(dict.fromkeys(row.backend for row in rows), key=lambda name: -figures[name, best])
    lines = [
        (
            name,
            human(figures[name, PARAMETERS]),
            f"{figures[name, STEPS]:.0f}",
            *(f"{figures[name, metric]:.1f}" for metric in metrics),
        )
        for name in names
    ]
    return ("mixer", PARAMETERS, STEPS, *(f"{metric}, %" for metric in metrics)), lines
