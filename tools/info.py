"""`terrazzo info`: one model, measured and described."""

import json

import click
import torch
from torch import nn

from terrazzo.tools.console import human, print_table
from terrazzo.tools.measure import measure
from terrazzo.tools.models import build_on_meta, family_of, pretrained_cfg, published_top1, require_model
from terrazzo.tools.trace import image_size, meta_outputs, taking


@click.command()
@click.argument("model")
@click.option("--size", type=int, nargs=2, metavar="H W", help="Image size [default: that of the published weights].")
@click.option("--in-chans", type=click.IntRange(min=1), default=3, show_default=True, help="Channels of the image.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: str, size: tuple[int, int] | None, in_chans: int, as_json: bool) -> None:
    """Describe MODEL: parameters, multiply-adds, activations, feature pyramid, and where its weights come from.

    Nothing is downloaded or computed: the shapes alone are run through the model.
    """
    facts = describe(model, size, in_chans)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    _print(facts)


def describe(name: str, size: tuple[int, int] | None = None, in_chans: int = 3) -> dict:
    """All that `terrazzo info` says, as JSON-ready values.

    Args:
        name: a timm model name.
        size: H, W; None for the input size of the published weights.
        in_chans: channels of the image.

    Raises:
        InputError: unknown name, or a size that the model cannot take.
    """
    require_model(name)
    cfg = pretrained_cfg(name)
    size = image_size(tuple(cfg.input_size[1:]) if size is None else size)
    model = build_on_meta(name, in_chans=in_chans)
    with taking(name, size):
        measured = measure(model, size, in_chans)
        output = list(meta_outputs(model, size, in_chans).shape)
    return {
        "model": name,
        "family": family_of(name.split(".", 1)[0]) or "timm",
        "input": [1, in_chans, *size],
        "params": measured.params,
        "macs": measured.macs,
        "activations": measured.activations,
        "output": output,
        "pyramid": _pyramid(name, size, in_chans),
        "weights": {
            "tag": cfg.tag or None,
            "url": cfg.url if isinstance(cfg.url, str) else None,
            "hub": cfg.hf_hub_id,
            "origin": cfg.origin_url,
            "licence": cfg.license,
            "paper": cfg.paper_name,
            "paper_ids": cfg.paper_ids,
            "top1_published": published_top1(cfg),
            "description": cfg.description,
        },
    }


def _pyramid(name: str, size: tuple[int, int], in_chans: int) -> list[dict] | None:
    """Stride, channels and output shape of each feature map; None for a model that gives none."""
    try:
        model: nn.Module = build_on_meta(name, in_chans=in_chans, features_only=True)
    except (AttributeError, RuntimeError, AssertionError):
        return None
    maps = meta_outputs(model, size, in_chans)
    return [
        {"stride": stride, "channels": channels, "shape": list(map_.shape)}
        for stride, channels, map_ in zip(model.feature_info.reduction(), model.feature_info.channels(), maps)
        if isinstance(map_, torch.Tensor)
    ]


def _print(facts: dict) -> None:
    weights = facts["weights"]
    top1 = weights["top1_published"]
    rows = [
        ("model", f"{facts['model']} (family {facts['family']})"),
        ("input", _shape(facts["input"])),
        ("parameters", f"{human(facts['params'])} ({facts['params']:,})"),
        ("multiply-adds", f"{human(facts['macs'])} ({facts['macs']:,})"),
        ("activations", f"{human(facts['activations'])} ({facts['activations']:,})"),
        ("output", _shape(facts["output"])),
        ("paper", " ".join(filter(None, (weights["paper"], _joined(weights["paper_ids"])))) or None),
        ("weights", weights["url"] or weights["hub"] or ("by hand" if weights["licence"] else "none published")),
        ("note", weights["description"]),
        ("origin", weights["origin"]),
        ("licence", weights["licence"]),
        ("top-1 published", None if top1 is None else f"{top1:.1f} %"),
    ]
    print_table([row for row in rows if row[1] is not None])
    if facts["pyramid"]:
        rows = [(level["stride"], level["channels"], _shape(level["shape"])) for level in facts["pyramid"]]
        print_table(rows, ("stride", "channels", "feature map"), right=(0, 1))
    else:
        click.echo("feature maps: none (features_only is not supported)")


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def _joined(ids: str | tuple | None) -> str | None:
    return ids if ids is None or isinstance(ids, str) else ", ".join(ids)
