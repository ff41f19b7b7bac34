"""A static page of every model's counts and times in model_cards/results, over accuracy, with filters and cards.

The page is `explorer.html` with the figures, the cards and Plotly's script put in. It loads nothing from elsewhere.
"""

import csv
import importlib.util
import json
from dataclasses import fields
from pathlib import Path

from markdown_it import MarkdownIt

from terrazzo.errors import InputError, install_command
from terrazzo.tools import results

COUNTED = {
    "parameters": ("parameters, M", 1e6),
    "multiply-adds": ("multiply-adds, G", 1e9),
    "activations": ("activations (outputs of all layers), M", 1e6),
}
"""Metrics of models.csv: the title of each in plots, and the number that its values are divided by."""

_TEMPLATE = Path(__file__).with_suffix(".html")
_SCRIPT = Path("package_data") / "plotly.min.js"


def points() -> list[dict]:
    """Every figure of a model of terrazzo: its family, accuracy, runtime, dtype, images, device and value.

    Figures of models without a published accuracy have None there.
    """
    from terrazzo.tools.models import pretrained_cfg, published_top1, registered_models

    families = registered_models()
    accuracies = {name: published_top1(pretrained_cfg(name)) for name in families}
    found = []
    for path in sorted(results.FOLDER.glob("*.csv")):
        for row in _rows(path):
            # Rows that a family's benchmark wrote, and the counts; others compare forms of one model with each other.
            if row.variant in families and row.what.removesuffix("_runtimes") == families[row.variant]:
                found.append(_point(row, families[row.variant], accuracies[row.variant]))
    return found


def page(card_address: str = "") -> str:
    """The whole page as HTML.

    Args:
        card_address: where a family's card is as a page of its own, with `{}` for the family; "" for nowhere.

    Raises:
        InputError: Plotly is not installed.
    """
    script = _plotly().read_text(encoding="utf-8")
    figures = points()
    families = sorted({figure["family"] for figure in figures})
    values = {"points": figures, "cards": {family: _card(family) for family in families}, "address": card_address}
    text = json.dumps(values, separators=(",", ":")).replace("</", "<\\/")  # "</script>" would end the script
    template = _TEMPLATE.read_text(encoding="utf-8")
    for mark, content in (("/*PLOTLY*/", script), ("/*VALUES*/", f"const values = {text};")):
        before, _, after = template.partition(mark)
        template = before + content + after
    return template


def _plotly() -> Path:
    found = importlib.util.find_spec("plotly")
    path = Path(found.submodule_search_locations[0]) / _SCRIPT if found else _SCRIPT
    if not path.is_file():
        raise InputError(
            "the explorer draws with the package plotly, which is not installed; install it with: "
            + install_command("explore")
        )
    return path


def _rows(path: Path) -> list[results.Row]:
    """The rows of a file; none if it is a table of another kind."""
    with open(path, newline="") as file:
        head = next(csv.reader(file), [])
    return results.read(path) if head == [field.name for field in fields(results.Row)] else []


def _point(row: results.Row, family: str, accuracy: float | None) -> dict:
    counted = row.metric in COUNTED
    title, unit = COUNTED.get(row.metric, (f"{row.metric}, {row.unit}", 1))
    batch, _, *size = row.shape.split("x")
    return {
        "what": row.what,
        "model": row.variant,
        "family": family,
        "top1": accuracy,
        "metric": title,
        "value": row.p50 / unit,
        "from": row.p20 / unit,
        "to": row.p80 / unit,
        "runtime": "counted" if counted else f"{row.backend}, {row.dtype}",
        "size": "x".join(size),
        "batch": batch,
        "device": row.device,
        "versions": row.versions,
        "commit": row.commit,
    }


def _card(family: str) -> str:
    """A card as HTML, without links: they lead to files that the page does not have beside it."""
    text = (results.FOLDER.parent / f"{family}.md").read_text(encoding="utf-8")
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "image", "autolink"])
    lines = [line for line in text.splitlines() if not line.startswith("<!--")]
    return markdown.render("\n".join(lines))
