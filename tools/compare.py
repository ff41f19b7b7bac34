"""`terrazzo compare`: backbones under one recipe and one budget, with the heads and the data of one config."""

import json
import numbers
import re
import statistics
from pathlib import Path

import click

from terrazzo._files import written_whole
from terrazzo.tools.options import UserPath, config_options

DONE = "final.json"
"""Written into the folder of a run when it has ended: a second call of the command goes on with the others."""

_ARGUMENT = re.compile(r",(?=\w+=)")
_NO_NAME = re.compile(r"[^\w.]+")


@click.command()
@click.argument("config")
@config_options
@click.option(
    "--backbone",
    "backbones",
    multiple=True,
    required=True,
    metavar="NAME[,KEY=VALUE...]",
    help="A timm model and arguments of it; give several.",
)
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Runs of each, seeds 0, 1, ...")
@click.option("--max-iters", type=click.IntRange(min=1), help="Train so many iterations.")
@click.option("--max-epochs", type=click.IntRange(min=1), help="Train so many epochs.")
@click.option("--out", type=UserPath(), required=True, help="Folder of the runs, curves and rows.")
def command(
    config: str,
    overrides: dict,
    data_root: Path | None,
    backbones: tuple[str, ...],
    seeds: int,
    max_iters: int | None,
    max_epochs: int | None,
    out: Path,
) -> None:
    """Train CONFIG once with each backbone, from scratch, and write losses and metrics side by side.

    A run that was interrupted goes on from its last checkpoint when the command is given again.
    """
    from terrazzo.openmmlab.config import load_config, parse_options
    from terrazzo.openmmlab.swap import swap_backbone
    from terrazzo.tools import mm, results
    from terrazzo.tools.console import print_table
    from terrazzo.tools.data_checks import check_data
    from terrazzo.tools.files import check_folder

    configs = {}
    for name in backbones:
        cfg = load_config(config, data_root, overrides)
        model, *arguments = _ARGUMENT.split(name)
        swap_backbone(cfg, model, **parse_options(arguments))
        mm.shorten(cfg, max_iters, max_epochs)
        mm.check_model(cfg)
        configs[name] = cfg
    check_data(cfg, ("train", "val"))
    check_folder(out)
    done: dict[str, list[dict]] = {name: [] for name in backbones}
    for seed in range(seeds):  # in turns, so that an interrupted comparison has as much of each
        for name in backbones:
            done[name].append(_train(configs[name], out / f"{_NO_NAME.sub('-', name)}-{seed}", seed))
            click.echo(f"{name}, seed {seed}: {_line(done[name][-1]['metrics'])}")
    _draw(done, out / "curves.png")
    rows = _rows(Path(config).stem, configs, done, results)
    results.write(out / "training.csv", rows)
    names = sorted({row.metric for row in rows})
    table = [
        [name, *(f"{row.p50:.4g}" for key in names for row in rows if (row.variant, row.metric) == (name, key))]
        for name in backbones
    ]
    print_table(table, ["backbone", *names], right=range(1, len(names) + 1))
    click.echo(f"wrote {out / 'training.csv'} and {out / 'curves.png'}")


def _train(cfg, work_dir: Path, seed: int) -> dict:
    """One run: `metrics` of the validation set at the end, `losses` as pairs of iteration and loss, `parameters`."""
    from mmengine.hooks import Hook

    from terrazzo.openmmlab.config import build_runner

    class Keeper(Hook):
        """Keeps the metrics of the last validation."""

        metrics: dict | None = None

        def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
            self.metrics = metrics

    if (work_dir / DONE).is_file():
        return json.loads((work_dir / DONE).read_text())
    cfg = cfg.copy()
    cfg.train_cfg.val_interval = 10**9  # mmengine validates after the last iteration whatever the interval
    cfg.default_hooks.checkpoint.pop("save_best", None)
    runner = build_runner(cfg, work_dir, resume=True, seed=seed, purpose="train")
    keeper = Keeper()
    runner.register_hook(keeper)
    runner.train()
    metrics = keeper.metrics or runner.val()  # a run that was interrupted while it validated has nothing left to train
    final = {
        "metrics": {key: float(value) for key, value in metrics.items() if isinstance(value, numbers.Real)},
        "losses": _losses(work_dir),
        "parameters": sum(parameter.numel() for parameter in runner.model.backbone.parameters()),
        "iterations": runner.iter,
    }
    with written_whole(work_dir / DONE) as temporary:
        temporary.write_text(json.dumps(final, indent=1))
    return final


def _losses(work_dir: Path) -> list[tuple[int, float]]:
    """The losses that mmengine logged, in the order of iterations, over all parts of an interrupted run."""
    found = {}
    for path in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            if "loss" in entry:
                found[entry.get("step", entry.get("iter"))] = entry["loss"]
    return sorted(found.items())


def _rows(config: str, configs: dict, done: dict[str, list[dict]], results) -> list:
    """A row for each backbone and metric; with several seeds, their quantiles."""
    rows = []
    for name, runs in done.items():
        batch = configs[name].train_dataloader.batch_size
        seeds = f"{len(runs)} seeds" if len(runs) > 1 else "1 seed"
        budget = f"{runs[0]['iterations']} iterations of batch {batch}, from scratch, {seeds}"
        final = {key: [run["metrics"][key] for run in runs] for key in runs[0]["metrics"]}
        final["loss"] = [run["losses"][-1][1] for run in runs if run["losses"]]
        final["backbone parameters"] = [run["parameters"] for run in runs]
        for metric, values in final.items():
            if not values:  # no loss was logged
                continue
            cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
            spread = (cuts[0], statistics.median(values), cuts[-1])
            unit = "1" if metric == "loss" or "parameters" in metric else "%" if max(values) > 1 else "fraction"
            rows.append(
                results.Row(
                    "training",
                    name,
                    config,
                    "float32",
                    budget,
                    metric,
                    unit,
                    *spread,
                    results.device_name(),
                    results.versions(),
                    results.commit(),
                )
            )
    return rows


def _draw(done: dict[str, list[dict]], path: Path) -> None:
    """The losses of all runs in one picture, a colour for each backbone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel="training loss")
    for index, (name, runs) in enumerate(done.items()):
        for seed, run in enumerate(runs):
            if run["losses"]:
                # Points, too: a line through one would not be seen.
                axes.plot(*zip(*run["losses"]), marker=".", color=f"C{index}", label=None if seed else name)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)


def _line(metrics: dict[str, float]) -> str:
    """The metrics in a line, without the figures of single classes."""
    return ", ".join(f"{key} {value:.4g}" for key, value in metrics.items() if not re.search(r"precision|\[", key))
