"""`terrazzo explain`: which backend each operator of a model runs on, why the others do not, and what it costs."""

import json
from collections.abc import Sequence

import click
import torch

from terrazzo.kernels.dispatch import backend as backends
from terrazzo.tools.inspect.conversion_options import Conversion, conversion_options
from terrazzo.tools.inspect.costs import explain
from terrazzo.tools.inspect.explanation import print_facts
from terrazzo.tools.inspect.seats import seats
from terrazzo.tools.inspect.trace import image_size, taking, trace
from terrazzo.tools.mechanisms import Mechanism, change_options, changed
from terrazzo.tools.models import build_for, pretrained_cfg, require_model
from terrazzo.tools.targets import pick_device

DTYPES = ("float32", "bfloat16", "float16")


EXIT_REFUSED = 1


@click.command()
@click.argument("model")
@click.option(
    "--size", type=int, nargs=2, metavar="H W", help="Image size [default: the size of the published weights]."
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Number of images.")
@click.option("--device", help="cpu, cuda, cuda:1, mps [default: a GPU if there is one].")
@click.option("--dtype", type=click.Choice(DTYPES), default=DTYPES[0], show_default=True, help="Of weights and images.")
@click.option(
    "--backend",
    type=click.Choice(backends.BACKENDS),
    default="auto",
    show_default=True,
    help=f"The backend to ask for; auto follows {backends.ENVIRONMENT}.",
)
@change_options
@conversion_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str,
    size: tuple[int, int] | None,
    batch: int,
    device: str | None,
    dtype: str,
    backend: str,
    changes: Sequence[Mechanism],
    conversion: Conversion | None,
    as_json: bool,
) -> int:
    """Say which backend runs each operator of MODEL here, why the others do not, and what the model costs.

    With --mixer it also says in which layers the mechanism computes softmax attention on a small map, and why.

    Nothing is downloaded or computed: only shapes run through the model. The exit code is 1 if the requested backend
    cannot run.

    With --convert it runs the pictures instead, and says which attention layers of MODEL, a plain timm ViT, this mixer
    replaces with the least change of the output, and what each layer saves. --checkpoint may be of a model with this
    mixer, whose weights are kept.
    """
    require_model(model)
    target = pick_device(device)
    if conversion is not None:
        facts = conversion.run(model, size, batch, target, dtype, backend, changes, quiet=as_json)
        if as_json:
            click.echo(json.dumps(facts, indent=2))
        return 0
    channels, *default_size = pretrained_cfg(model).input_size
    size = image_size(size or tuple(default_size))
    built = changed(build_for(model, size), changes).to(getattr(torch, dtype))
    with taking(model, size), seats(built) as mixers:
        operations = trace(built, size, channels, batch)
    facts = {"model": model, "input": [batch, channels, *size], "dtype": dtype, "device": str(target)}
    facts |= {"changes": [change.name for change in changes], "mixers": mixers}
    facts |= explain(built, operations, target, backend)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        print_facts(facts)
    return 0 if all(call["backend"] for call in facts["calls"]) else EXIT_REFUSED
