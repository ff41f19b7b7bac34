"""The table of losses by lower precision."""

from terrazzo.tools.reports.precision import table
from terrazzo.tools.results import Row


def row(dtype, metric, value, unit="1", variant="a"):
    return Row(
        "precision", variant, "1x3x64x96", dtype, "onnxruntime", metric, unit, value, value, value, "d", "v", "c"
    )


def file(precision, points, kept, variant="a"):
    """The rows of a file, as export writes them; if `kept`, one of three layers is in float32."""
    return [
        row("float32", "mIoU", 70.0, "points", variant),
        row(precision, "mIoU", points, "points", variant),
        row("float32", "file size", 80.0, "MiB", variant),
        row(precision, "file size", 20.0, "MiB", variant),
        row(precision, "error of the outputs", 0.01, variant=variant),
        row(precision, "layers", 3, variant=variant),
        row(precision, "layers in float32", kept, variant=variant),
        row(precision, "error at stem", 0.02, variant=variant),
        row("float32" if kept else precision, "error at head", 0.5, variant=variant),
        row(precision, "error by stem alone", 0.9, variant=variant),
    ]


def test_a_line_for_each_file_and_metric():
    head, lines = table([*file("fp16", 69.5, 0), *file("int8", 60.25, 1), *file("fp16", 70.0, 0, "b")])
    found = [dict(zip(head, line)) for line in lines]
    assert [(line["model"], line["precision"]) for line in found] == [("`a`", "fp16"), ("`a`", "int8"), ("`b`", "fp16")]
    assert found[1] == {
        "model": "`a`",
        "image": "64x96",
        "precision": "int8",
        "metric": "mIoU",
        "float32": "70.00",
        "lowered": "60.25",
        "change": "-9.75",
        "layers in float32": "1 of 3",
        "size": "0.25 x",
        "worst layer": "`stem` 2.0e-02",
    }
    assert found[0]["worst layer"] == "`head` 5.0e-01"
