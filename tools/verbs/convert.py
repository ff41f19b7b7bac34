"""`terrazzo convert`: the weights of a checkpoint, alone, as safetensors or as plain .pth."""

from pathlib import Path

import click
import torch

from terrazzo.backbones._weights import licence_notices
from terrazzo.errors import InputError


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--ema", is_flag=True, help="Take the weights that EMAHook set aside, rather than those in use.")
def command(checkpoint: Path, out: Path, ema: bool) -> None:
    """Write the weights of CHECKPOINT to OUT: a .safetensors file, or a .pth file that loads with weights_only.

    CHECKPOINT may be mmengine's, ours or a .safetensors file; what could run code is refused and named.
    """
    from terrazzo.openmmlab.checkpoint import load_file, save_checkpoint

    if out.suffix not in (".safetensors", ".pth"):
        raise InputError(f"{out.name} ends in neither .safetensors nor .pth; name a file that does")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} is not a folder, so {out.name} cannot be written there")
    saved = load_file(checkpoint, "cpu")
    key = "ema_state_dict" if ema else "state_dict"
    state = saved.get(key) if isinstance(saved, dict) else None
    if ema and state is None:
        raise InputError(f"{checkpoint} has no ema_state_dict; leave --ema out")
    state = saved if state is None else state
    weights = {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if ema:
        weights.pop("steps", None)  # the average's counter of updates is no weight
    if not weights:
        raise InputError(f"{checkpoint} holds no weights")
    save_checkpoint(weights if out.suffix == ".safetensors" else {"state_dict": weights}, str(out))
    click.echo(f"wrote {len(weights)} tensors, {sum(value.numel() for value in weights.values()):,} numbers: {out}")
    for notice in licence_notices(weights):
        click.echo(notice, err=True)
