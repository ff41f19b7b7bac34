"""Curves of a training: the numbers that mmengine logged, and a picture of them."""

import json
import re
from pathlib import Path

_RATES = ("lr", "base_lr")
_OF_LAYER = re.compile(r"(error|front)\d+$")
"""Names of numbers that a training logs for each layer."""


def read_curves(work_dir: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """The numbers that mmengine logged, over all parts of an interrupted run.

    Returns:
        "train" and "val", each with names and their pairs of step and value; steps are iterations, or epochs in the
        validation of a training that counts epochs. Empty if nothing was logged.
    """
    found: dict[str, dict[str, dict[float, float]]] = {}
    for path in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for text in path.read_text().splitlines():
            entry = json.loads(text)
            step = entry.get("step", entry.get("iter"))
            part = found.setdefault("train" if "loss" in entry else "val", {})
            for key, value in entry.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool) and step is not None:
                    part.setdefault(key, {})[step] = value
    return {part: {key: sorted(values.items()) for key, values in keys.items()} for part, keys in found.items()}


def draw_curves(curves: dict[str, dict[str, list[tuple[float, float]]]], unit: str, path: Path) -> None:
    """Losses, learning rate and metrics of a training in one picture; errors of layers, too, if it logs these.

    Args:
        curves: as from `read_curves`.
        unit: what the validation counts: "epoch" or "iteration".
        path: the PNG file.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    train, val = curves.get("train", {}), curves.get("val", {})
    losses = [key for key in train if "loss" in key]
    other = ("step", "iter", "epoch", "time", "data_time", "memory")
    metrics = [key for key in val if key not in other and "[" not in key and "precision" not in key]
    metrics = [key for key in metrics if not _OF_LAYER.search(key)]
    layers = [key for key in train if _OF_LAYER.match(key) and key.startswith("error")]
    parts = [
        ("training loss", "iteration", train, losses),
        ("learning rate", "iteration", train, [key for key in train if key in _RATES][:1]),
        ("validation", unit, val, metrics),
    ]
    if layers:
        parts.append(("relative error of layers", "iteration", train, layers))
    figure = Figure(figsize=(5 * len(parts), 4), layout="constrained")
    for axes, (title, horizontal, values, keys) in zip(figure.subplots(1, len(parts)), parts):
        axes.set(title=title, xlabel=horizontal)
        if keys is layers:  # colours by depth, because there are more layers than colours in matplotlib's cycle
            axes.set_prop_cycle(color=colormaps["viridis"].resampled(len(layers)).colors)
        for key in keys if keys is layers else keys[:8]:
            # Points, too: a line through a single point would be invisible.
            axes.plot(*zip(*values[key]), marker="." if len(values[key]) < 50 else None, label=key)
        axes.grid(alpha=0.3)
        if keys:
            axes.legend(fontsize="small", ncols=1 + len(axes.lines) // 9)
    figure.savefig(path, dpi=110, format="png")
