"""What each family can do, as the contract tests found it: the rows of the result file, and the tables made from it."""

from collections.abc import Sequence
from dataclasses import dataclass

from terrazzo.errors import InputError
from terrazzo.tools import results

PATH = results.FOLDER / "capabilities.csv"

CAPABILITIES = {
    "timm": "`timm.create_model`, as a classifier and with `features_only`",
    "mmdet": "`TerrazzoBackbone` in mmdet: a training step of RetinaNet",
    "mmseg": "`TerrazzoBackbone` in mmseg: a training step of Semantic FPN",
    "compile": "`torch.compile`: one graph, for images of any size",
    "pt2": "`terrazzo export --format pt2`",
    "onnx": "`terrazzo export`, also with `--features`: an output for each level, by name",
    "onnx dynamic batch": "`terrazzo export --dynamic batch`",
    "onnx dynamic hw": "`terrazzo export --dynamic hw`",
    "tensorrt operators": "every node of the ONNX files is among those that TensorRT documents",
    "openvino": "`terrazzo export --format openvino`",
    "fp16": "`terrazzo export --fp16`: random weights' outputs within 1 %, most layers lowered, TensorRT's operators",
    "int8": "`terrazzo export --int8`: the same within 10 %",
}
"""The capabilities, and what exactly is tested for each: `test_NAME` in tests/support/capabilities.py."""

YES, NO = "yes", "no"


@dataclass(frozen=True)
class Cell:
    """What a test found about one capability of one family.

    Attributes:
        supported: `YES` or `NO`.
        reason: the error's text if it failed, else empty.
        model: the family's model that was tested.
        test: what pytest calls the test.
    """

    family: str
    capability: str
    supported: str
    reason: str
    model: str
    test: str
    versions: str
    commit: str


def read() -> dict[tuple[str, str], Cell]:
    """The stored cells, by family and capability."""
    return {(cell.family, cell.capability): cell for cell in results.read(PATH, Cell)}


def store(cell: Cell) -> None:
    """Put a cell into the file, in place of the old cell."""
    cells = read() | {(cell.family, cell.capability): cell}
    order = list(CAPABILITIES)
    results.write(PATH, sorted(cells.values(), key=lambda cell: (cell.family, order.index(cell.capability))), Cell)


def table(cells: Sequence[Cell]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines: a line for each family, with a note's number at each refusal."""
    reasons = _reasons(cells)
    found = {(cell.family, cell.capability): cell for cell in cells}
    lines = []
    for family in dict.fromkeys(cell.family for cell in cells):
        marks = [_mark(found.get((family, capability)), reasons) for capability in CAPABILITIES]
        lines.append((f"[{family}](model_cards/{family}.md)", *marks))
    return ("family", *CAPABILITIES), lines


def family_table(cells: Sequence[Cell], family: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines: a line for each capability of one family, from its cells.

    Raises:
        InputError: There are no cells.
    """
    if not cells:
        raise InputError(f"{PATH} has no rows of {family!r}; run `pytest tests/backbones --write-capabilities`")
    reasons = _reasons(cells)
    found = {cell.capability: cell for cell in cells}
    return ("tested", f"`{cells[0].model}`"), [
        (f"{capability}: {meaning}", _mark(found.get(capability), reasons))
        for capability, meaning in CAPABILITIES.items()
    ]


def notes(cells: Sequence[Cell]) -> list[str]:
    """Sentences below a table: the reasons by their numbers, and with which versions it was tested."""
    versions = dict.fromkeys(part for cell in cells for part in cell.versions.split(", "))
    reasons = _reasons(cells)
    return [*(f"({number}) {reason}." for reason, number in reasons.items()), f"Tested with {', '.join(versions)}."]


def _reasons(cells: Sequence[Cell]) -> dict[str, int]:
    """The reasons of all refusals, numbered from 1."""
    reasons = dict.fromkeys(cell.reason for cell in cells if cell.supported == NO)
    return {reason: number for number, reason in enumerate(reasons, 1)}


def _mark(cell: Cell | None, reasons: dict[str, int]) -> str:
    if cell is None:
        return "not tested"
    return YES if cell.supported == YES else f"{NO} ({reasons[cell.reason]})"
