"""`terrazzo convert`: the weights of a checkpoint, alone, as safetensors or as plain .pth."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from terrazzo.errors import InputError
from terrazzo.tools.options import UserPath

if TYPE_CHECKING:
    import torch


@click.command()
@click.argument("checkpoint", type=UserPath())
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--ema",
    is_flag=True,
    help="Take the averaged weights: ema_state_dict, as EMAHook saves it, or state_dict_ema, model_ema, ema, "
    "params_ema.",
)
def command(checkpoint: Path, out: Path, ema: bool) -> None:
    """Write the weights of CHECKPOINT to OUT: a .safetensors file, or a .pth file that loads with weights_only.

    CHECKPOINT may be a file of mmengine, timm or terrazzo, or a .safetensors file; its weights may be under state_dict,
    model or another usual key. OUT also keeps the record of mixers and token reduction. A file that could run code is
    refused, and the message says why.
    """
    from terrazzo.backbones._weights import licence_notices, weights_of
    from terrazzo.checkpoints.files import load_file, save_file
    from terrazzo.checkpoints.records import meta_of, recorded

    if out.suffix not in (".safetensors", ".pth"):
        raise InputError(f"{out.name} ends in neither .safetensors nor .pth; name a file that does")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} is not a folder, so {out.name} cannot be written there")
    saved = load_file(checkpoint, "cpu")
    try:
        weights = {name: _alone(value) for name, value in weights_of(saved, ema).items()}
    except InputError as error:
        raise InputError(f"{checkpoint} {error}{'; leave --ema out' if ema else ''}") from error
    meta = meta_of(recorded(saved, checkpoint))
    save_file({"state_dict": weights} | ({"meta": meta} if meta else {}), out)
    click.echo(f"wrote {len(weights)} tensors, {sum(value.numel() for value in weights.values()):,} numbers: {out}")
    for notice in licence_notices(weights):
        click.echo(notice, err=True)


def _alone(tensor: "torch.Tensor") -> "torch.Tensor":
    """A tensor without the rest of its storage, which a file would keep; tied tensors stay tied."""
    import torch

    tensor = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
