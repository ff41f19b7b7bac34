"""`terrazzo train`: what a config describes, trained by mmengine's runner."""

from pathlib import Path

import click

from terrazzo.errors import InputError
from terrazzo.tools.options import UserPath, config_options


@click.command()
@click.argument("config")
@config_options
@click.option("--work-dir", type=UserPath(), help="Logs and checkpoints [default: work_dirs/CONFIG].")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in the work dir.")
@click.option("--amp", type=click.Choice(["fp16", "bf16"]), help="Automatic mixed precision.")
@click.option("--accumulate", type=click.IntRange(min=1), default=1, help="Batches per step of the optimizer.")
@click.option("--auto-scale-lr", is_flag=True, help="Scale the learning rate by the batch size.")
@click.option(
    "--launcher",
    type=click.Choice(["none", "pytorch", "slurm", "mpi"]),
    default="none",
    help="The launcher that started several processes.",
)
@click.option("--fsdp", is_flag=True, help="Divide the model among the processes (fully sharded data parallel).")
@click.option(
    "--spatial", type=click.IntRange(min=2), metavar="R", help="Let R processes share the rows of each training image."
)
@click.option("--max-iters", type=click.IntRange(min=1), help="Number of iterations to train; schedules scale along.")
@click.option("--max-epochs", type=click.IntRange(min=1), help="Number of epochs to train; schedules scale along.")
@click.option(
    "--log",
    "logs",
    type=click.Choice(["tensorboard", "wandb"]),
    multiple=True,
    help="Also log to TensorBoard (in the work dir) or Weights & Biases; repeatable.",
)
@click.option("--report/--no-report", default=True, help="Draw curves, confusions and examples at the end.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of weights, order and augmentation.")
def command(
    config: str,
    overrides: dict,
    data_root: Path | None,
    work_dir: Path | None,
    resume: bool,
    amp: str | None,
    accumulate: int,
    auto_scale_lr: bool,
    launcher: str,
    fsdp: bool,
    spatial: int | None,
    max_iters: int | None,
    max_epochs: int | None,
    logs: tuple[str, ...],
    report: bool,
    seed: int | None,
) -> None:
    """Train what CONFIG describes: a file, or the name of a packaged config.

    Everything a user can get wrong is checked before the work dir is made. On a terminal, a bar shows loss and time
    left; elsewhere the log's lines are printed. The work dir has the whole log and, at the end, curves.png,
    confusion.png and examples.png.
    """
    from mmengine.dist import is_main_process

    from terrazzo.openmmlab.config import build_runner, load_config
    from terrazzo.openmmlab.distributed import check_launcher, is_first_here
    from terrazzo.openmmlab.saving import find_latest_checkpoint
    from terrazzo.tools import mm
    from terrazzo.tools.data.checks import check_data
    from terrazzo.tools.training.progress import shown
    from terrazzo.tools.training.report import ReportHook

    cfg = load_config(config, data_root, overrides)
    launcher = cfg.get("launcher", "none") if launcher == "none" else launcher
    check_launcher(launcher)
    work_dir = Path(work_dir or cfg.get("work_dir") or Path("work_dirs") / Path(cfg.filename).stem)
    for key in ("train_dataloader", "train_cfg", "optim_wrapper"):
        if not cfg.get(key):
            raise InputError(f"config {cfg.filename} has no {key}; there is nothing to train")
    resume_from = resume or (cfg.get("resume") and (cfg.get("load_from") or True)) or False
    mm.shorten(cfg, max_iters, max_epochs)
    mm.add_logs(cfg, logs)
    if is_first_here(launcher):
        check_data(cfg, ("train", "val") if cfg.get("val_cfg") else ("train",))
    mm.check_work_dir(work_dir, resume_from)
    reports = [ReportHook(cfg)] if report else []
    with shown() as hooks:
        runner = build_runner(
            cfg,
            work_dir,
            resume=resume_from,
            seed=seed,
            amp=amp,
            accumulate=accumulate,
            launcher=launcher,
            sharded=fsdp,
            spatial=spatial or 1,
            scale_lr=auto_scale_lr,
            purpose="train",
        )
        for hook in (*hooks, *reports):
            runner.register_hook(hook)
        runner.train()
    if is_main_process():
        latest = find_latest_checkpoint(str(work_dir))
        pictures = ", ".join(path.name for hook in reports for path in hook.written)
        click.echo(
            f"trained {runner.iter} iterations; {f'pictures in {work_dir}: {pictures}; ' if pictures else ''}"
            f"last checkpoint: {latest or 'none'}"
        )
