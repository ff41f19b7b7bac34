"""Tables for choosing a model: which models no other beats in accuracy and cost, and what was timed."""

from collections.abc import Iterable

from terrazzo.tools.reports import explorer

_RUNTIMES = {
    "PyTorch, ms": ("{}", "eager, float32"),
    "torch.compile, ms": ("{}_runtimes", "compiled, float32"),
    "ONNX Runtime, ms": ("{}_runtimes", "onnxruntime, float32"),
    "OpenVINO, ms": ("{}_runtimes", "openvino, float32"),
}
"""The columns of the table of times: the benchmark that has the rows, with `{}` for the family, and its runtime."""

_SIZES = ("224x224", "512x512")


def front(points: Iterable[dict]) -> list[dict]:
    """The points, by value, that have a higher accuracy than every point of a smaller or the same value."""
    best: list[dict] = []
    known = [point for point in points if point["top1"] is not None]
    for point in sorted(known, key=lambda point: (point["value"], -point["top1"], point["model"])):
        if not best or point["top1"] > best[-1]["top1"]:
            best.append(point)
    return best


def front_table(metric: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The models at 224 pixels that no other beats in accuracy and in a counted metric, such as "parameters"."""
    from terrazzo.tools.models import NO_WEIGHTS, pretrained_cfg

    title, _ = explorer.COUNTED[metric]
    points = [point for point in explorer.points() if point["metric"] == title and point["size"] == _SIZES[0]]
    lines = [
        (
            f"`{point['model']}`",
            f"{point['value']:.2f}",
            f"{point['top1']:.1f}",
            pretrained_cfg(point["model"]).license or NO_WEIGHTS,
            f"[{point['family']}](model_cards/{point['family']}.md)",
        )
        for point in front(points)
    ]
    return ("model", title, "published top-1, %", "weights' licence", "card"), lines


def time_table() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The models that were timed on a CPU at batch 1: a line for each model and size, by time."""
    timed = [point for point in explorer.points() if point["metric"] == "forward, ms" and point["batch"] == "1"]
    lines = []
    for size in _SIZES:
        found: dict[str, dict[str, dict]] = {}
        for point in timed:
            for title, (what, runtime) in _RUNTIMES.items():
                if (point["what"], point["runtime"], point["size"]) == (what.format(point["family"]), runtime, size):
                    found.setdefault(point["model"], {})[title] = point
        complete = [columns for columns in found.values() if "PyTorch, ms" in columns]
        for columns in sorted(complete, key=lambda columns: columns["PyTorch, ms"]["value"]):
            first = columns["PyTorch, ms"]
            top1 = "-" if first["top1"] is None else f"{first['top1']:.1f}"
            times = [f"{columns[title]['value']:.0f}" if title in columns else "-" for title in _RUNTIMES]
            lines.append((f"`{first['model']}`", size, top1, *times))
    return ("model", "image", "published top-1, %", *_RUNTIMES), lines
