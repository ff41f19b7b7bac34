"""`terrazzo train`: what a config describes, trained by mmengine's runner."""

from pathlib import Path

import click
import torch

from terrazzo.errors import InputError
from terrazzo.tools.options import config_options


@click.command()
@click.argument("config")
@config_options
@click.option("--work-dir", type=click.Path(path_type=Path), help="Logs and checkpoints [default: work_dirs/CONFIG].")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in the work dir.")
@click.option("--amp", is_flag=True, help="Automatic mixed precision.")
@click.option("--max-iters", type=click.IntRange(min=1), help="Train so many iterations.")
@click.option("--max-epochs", type=click.IntRange(min=1), help="Train so many epochs.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of weights, order and augmentation.")
def command(
    config: str,
    overrides: dict,
    data_root: Path | None,
    work_dir: Path | None,
    resume: bool,
    amp: bool,
    max_iters: int | None,
    max_epochs: int | None,
    seed: int | None,
) -> None:
    """Train what CONFIG describes: a file, or the name of a packaged config.

    Everything a user can get wrong is checked before the work dir is made.
    """
    from terrazzo.openmmlab.config import build_runner, load_config
    from terrazzo.tools import mm
    from terrazzo.tools.data_checks import check_data

    if amp and not torch.cuda.is_available():
        raise InputError("--amp needs a GPU, and PyTorch sees none here; leave it out")
    cfg = load_config(config, data_root, overrides)
    work_dir = work_dir or Path(cfg.get("work_dir") or Path("work_dirs") / Path(cfg.filename).stem)
    mm.shorten(cfg, max_iters, max_epochs)
    check_data(cfg, ("train", "val") if cfg.get("val_cfg") else ("train",))
    mm.check_work_dir(work_dir, resume)
    mm.check_model(cfg)
    runner = build_runner(cfg, work_dir, resume=resume, seed=seed, amp=amp)
    runner.train()
    note = work_dir / "last_checkpoint"
    click.echo(f"trained {runner.iter} iterations; last checkpoint: {note.read_text() if note.is_file() else 'none'}")
