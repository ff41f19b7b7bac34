"""Which layers of a trained ViT another mixer replaces best, measured on pictures, and the FLOPs that each layer saves.

`terrazzo.conversion_plan` measures; here are the weights, the pictures, the counts and the table.
"""

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from terrazzo.backbones._convert import convert_attention
from terrazzo.backbones._plan import COLUMNS, Plan, candidates
from terrazzo.backbones._rebuilt import change
from terrazzo.backbones._shared import shared_copy
from terrazzo.checkpoints.files import load_file
from terrazzo.checkpoints.loading import load_weights
from terrazzo.checkpoints.records import command, recorded
from terrazzo.errors import InputError, first_line
from terrazzo.tools.console import human, print_table
from terrazzo.tools.data.pictures import Picture, to_tensor
from terrazzo.tools.inspect.explanation import mixer_lines
from terrazzo.tools.inspect.seats import seats
from terrazzo.tools.inspect.trace import taking, trace
from terrazzo.tools.targets import load_timm_model


def load_student(name: str, checkpoint: Path, size: tuple[int, int], num_classes: int | None) -> nn.Module:
    """Build a timm ViT, convert it as the record of a checkpoint says, and load the checkpoint.

    Raises:
        InputError: the checkpoint cannot be read, does not fit the model, or is of a model that reduces tokens.
    """
    model = load_timm_model(name, num_classes=num_classes, size=size)
    record = recorded(load_file(str(checkpoint), "cpu"), checkpoint)
    if "reduce" in record:
        raise InputError(
            f"checkpoint '{checkpoint}' is of a model that merges or drops tokens, and --convert compares tokens one "
            "by one: name a checkpoint without a reduction"
        )
    try:
        change(model, record)
    except TypeError as error:
        raise InputError(f"checkpoint '{checkpoint}' does not fit this version: {first_line(error)}") from error
    load_weights(model, name, str(checkpoint), advice=command)
    return model.eval()


class Prepared:
    """Pictures as batches (B, 3, H, W), which are read again each time.

    Args:
        pictures: what to read.
        size: (H, W); the middle of each picture is cut in this shape.
        config: timm's data config of the model.
        batch: pictures of a batch, at most.
        done: called with the number of pictures after each batch.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        size: tuple[int, int],
        config: Mapping[str, Any],
        batch: int,
        done: Callable[[int], None],
    ):
        self.pictures, self.size, self.config, self.batch, self.done = pictures, size, config, batch, done

    def __iter__(self) -> Iterator[torch.Tensor]:
        mean, std = self.config["mean"], self.config["std"]
        for start in range(0, len(self.pictures), self.batch):
            taken = self.pictures[start : start + self.batch]
            yield torch.cat([to_tensor(picture.read(), self.size, mean, std, crop=True) for picture in taken])
            self.done(len(taken))


def savings(
    model: nn.Module, name: str, mixer: str, size: tuple[int, int], options: Mapping[str, Any]
) -> dict[str, Any]:
    """What a mixer saves at a size, as JSON-ready values.

    Args:
        model: a host of `convert_attention`, whose layers may have this mixer already.
        name: its name, for errors.
        mixer, options: the mixer.

    Returns:
        flops: of the whole model for one image, with attention in the layers that a plan decides about.
        saved: for each of these layers, the FLOPs of its attention module less those with the mixer.
        mixers: what the mixers do at this size, as `seats` gives it.

    Raises:
        InputError: the model cannot be converted or cannot take images of this size, or the mixer is not valid.
    """
    layers = list(candidates(model, mixer, options))
    plain = convert_attention(shared_copy(model), "softmax", layers).eval()
    converted = convert_attention(shared_copy(model), mixer, layers, **options).eval()
    with taking(name, size), seats(converted) as mixers:
        dense, mixed = trace(plain, size), trace(converted, size)

    def of(operations: Sequence, layer: int) -> int:
        part = f"blocks.{layer}.attn"
        return sum(x.flops for x in operations if x.layer == part or x.layer.startswith(f"{part}."))

    return {
        "flops": sum(operation.flops for operation in dense),
        "saved": {layer: of(dense, layer) - of(mixed, layer) for layer in layers},
        "mixers": mixers,
    }


def facts_of(plan: Plan, counts: Mapping[str, Any]) -> dict[str, Any]:
    """A plan and its savings as JSON-ready values."""
    saved = counts["saved"]
    rows = [dataclasses.asdict(row) | {"flops_saved": saved[row.layer]} for row in plan.rows]
    return {
        "mixer": plan.mixer,
        "pictures": plan.images,
        "divergence_of": plan.of,
        "flops": counts["flops"],
        "layers": rows,
        "chosen": list(plan.layers),
        "chosen_flops_saved": sum(saved[layer] for layer in plan.layers),
        "mixers": counts["mixers"],
    }


def print_plan(facts: Mapping[str, Any], plan: Plan, name: str) -> None:
    """Print a plan's table beside the FLOPs saved, and what its choice means for a user.

    Args:
        facts: what `facts_of` gives, with the keys of `terrazzo explain`.
        plan: the plan.
        name: the mixer with its options, as a user writes it.
    """
    click.echo(f"{facts['model']}, {'x'.join(map(str, facts['input']))}, {facts['dtype']}, on {facts['device']}")
    click.echo(f"{name} in place of attention, measured on {plan.images} pictures")
    for line in mixer_lines(facts["mixers"]):
        click.echo(line)
    total = facts["flops"]
    saved = [(f"{row['flops_saved'] / 1e6:.1f}", f"{100 * row['flops_saved'] / total:.2f}") for row in facts["layers"]]
    rows = [(*cells, *more) for cells, more in zip(plan.cells(), saved)]
    head = (*COLUMNS, "MFLOPs saved", "% of the model")
    print_table(rows, head, right=tuple(range(len(head))))
    of = "logits" if plan.of == "logits" else "final tokens, normalised over their channels"
    click.echo(f"KL compares the {of}: each layer alone, and together with all layers above it.")
    click.echo("Errors are relative: of the layer's attention, of its tokens in front, and of the final tokens.")
    if not plan.layers:
        click.echo("No layer is within the limits.")
        return
    layers, chosen = ",".join(map(str, sorted(plan.layers))), facts["chosen_flops_saved"]
    click.echo(
        f"--mixer {shlex.quote(name)} --mixer-layers {layers} saves {human(chosen)} of {human(total)} FLOPs "
        f"({100 * chosen / total:.1f} %)"
    )
