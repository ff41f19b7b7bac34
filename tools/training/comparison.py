"""Backbones under one recipe and one budget: the runs, their rows, and a picture of their losses."""

import json
import numbers
import re
import statistics
from pathlib import Path

from terrazzo._files import written_whole
from terrazzo.tools import results
from terrazzo.tools.training.curves import read_curves

DONE = "final.json"
"""Written into the folder of a finished run: a second call of the command goes on with the other runs."""


def train(cfg, work_dir: Path, seed: int) -> dict:
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
    cfg.train_cfg.val_interval = 10**9  # mmengine validates after the last iteration, whatever the interval
    cfg.default_hooks.checkpoint.pop("save_best", None)
    runner = build_runner(cfg, work_dir, resume=True, seed=seed, purpose="train")
    keeper = Keeper()
    runner.register_hook(keeper)
    runner.train()
    metrics = keeper.metrics or runner.val()  # a run that was interrupted during validation has nothing left to train
    final = {
        "metrics": {key: float(value) for key, value in metrics.items() if isinstance(value, numbers.Real)},
        "losses": read_curves(work_dir).get("train", {}).get("loss", []),
        "parameters": sum(parameter.numel() for parameter in runner.model.backbone.parameters()),
        "iterations": runner.iter,
    }
    with written_whole(work_dir / DONE) as temporary:
        temporary.write_text(json.dumps(final, indent=1))
    return final


def rows_of(config: str, configs: dict, done: dict[str, list[dict]]) -> list:
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
            unit = _unit(metric, max(values))
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


def _unit(metric: str, largest: float) -> str:
    if metric == "loss" or "parameters" in metric:
        return "1"
    if "psnr" in metric:
        return "dB"
    return "%" if largest > 1 else "fraction"


def draw(done: dict[str, list[dict]], path: Path) -> None:
    """The losses of all runs in one picture, a colour for each backbone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel="training loss")
    for index, (name, runs) in enumerate(done.items()):
        for seed, run in enumerate(runs):
            if run["losses"]:
                # Points, too: a line through a single point would be invisible.
                axes.plot(*zip(*run["losses"]), marker=".", color=f"C{index}", label=None if seed else name)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)


def line(metrics: dict[str, float]) -> str:
    """The metrics in a line, without the figures of single classes."""
    return ", ".join(f"{key} {value:.4g}" for key, value in metrics.items() if not re.search(r"precision|\[", key))
