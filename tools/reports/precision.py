"""What half precision and INT8 cost, as `terrazzo export --fp16` and `--int8` wrote it, as a table."""

from collections.abc import Sequence

from terrazzo.tools.results import Row

ERROR = "error at "


def table(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A line for each metric of each file: float32, lower precision, and what stayed in float32.

    Args:
        rows: the rows of one or more files.
    """
    head = (
        "model",
        "image",
        "precision",
        "metric",
        "float32",
        "lowered",
        "change",
        "layers in float32",
        "size",
        "worst layer",
    )
    lines = []
    for variant, shape in dict.fromkeys((row.variant, row.shape) for row in rows):
        own = [row for row in rows if (row.variant, row.shape) == (variant, shape)]
        for precision in dict.fromkeys(row.dtype for row in own if row.metric == "error of the outputs"):
            found = {(row.dtype, row.metric): row.p50 for row in own}
            layers = {
                row.metric.removeprefix(ERROR): row.p50
                for row in own
                if row.metric.startswith(ERROR) and row.dtype == precision
            }
            worst = max(layers, key=layers.get)
            size = found[precision, "file size"] / found["float32", "file size"]
            metrics = [
                row.metric
                for row in own
                if row.dtype == precision and row.unit == "points" and ("float32", row.metric) in found
            ]
            for metric in metrics:
                before, after = found["float32", metric], found[precision, metric]
                lines.append(
                    (
                        f"`{variant}`",
                        shape.split("x", 2)[2],
                        precision,
                        metric.removeprefix("coco/").removeprefix("accuracy/"),
                        f"{before:.2f}",
                        f"{after:.2f}",
                        f"{after - before:+.2f}",
                        f"{found[precision, 'layers in float32']:.0f} of {found[precision, 'layers']:.0f}",
                        f"{size:.2f} x",
                        f"`{worst}` {layers[worst]:.1e}",
                    )
                )
    return head, lines
