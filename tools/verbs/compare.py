"""`terrazzo compare`: backbones under one recipe and one budget, with the heads and the data of one config."""

import re
from pathlib import Path

import click

from terrazzo.tools.options import UserPath, config_options
from terrazzo.tools.training import comparison

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
    help="A timm model and its arguments; repeatable.",
)
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Runs of each, seeds 0, 1, ...")
@click.option("--max-iters", type=click.IntRange(min=1), help="Number of iterations to train.")
@click.option("--max-epochs", type=click.IntRange(min=1), help="Number of epochs to train.")
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
    from terrazzo.tools.data.checks import check_data
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
    for seed in range(seeds):  # in turns, so that an interrupted comparison has as many runs of each backbone
        for name in backbones:
            done[name].append(comparison.train(configs[name], out / f"{_NO_NAME.sub('-', name)}-{seed}", seed))
            click.echo(f"{name}, seed {seed}: {comparison.line(done[name][-1]['metrics'])}")
    comparison.draw(done, out / "curves.png")
    rows = comparison.rows_of(Path(config).stem, configs, done)
    results.write(out / "training.csv", rows)
    names = sorted({row.metric for row in rows})
    table = [
        [name, *(f"{row.p50:.4g}" for key in names for row in rows if (row.variant, row.metric) == (name, key))]
        for name in backbones
    ]
    print_table(table, ["backbone", *names], right=range(1, len(names) + 1))
    click.echo(f"wrote {out / 'training.csv'} and {out / 'curves.png'}")
