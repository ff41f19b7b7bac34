"""`terrazzo info`: one model, measured and described."""

import json
from collections.abc import Sequence

import click

from terrazzo.tools.console import human, print_table
from terrazzo.tools.mechanisms import Mechanism, change_options


@click.command()
@click.argument("model")
@click.option(
    "--size", type=int, nargs=2, metavar="H W", help="Image size [default: the size of the published weights]."
)
@click.option("--in-chans", type=click.IntRange(min=1), default=3, show_default=True, help="Channels of the image.")
@change_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str, size: tuple[int, int] | None, in_chans: int, changes: Sequence[Mechanism], as_json: bool
) -> None:
    """Describe MODEL: parameters, multiply-adds, activations, feature pyramid, and where its weights come from.

    Nothing is downloaded or computed: only shapes run through the model.
    """
    from terrazzo.tools.inspect.description import describe

    facts = describe(model, size, in_chans, changes)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    _print(facts)


def _print(facts: dict) -> None:
    weights = facts["weights"]
    top1 = weights["top1_published"]
    rows = [
        ("model", f"{facts['model']} (family {facts['family']})"),
        ("changed by", " and ".join(facts["changes"]) or None),
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
