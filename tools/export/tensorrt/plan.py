"""How TensorRT should build an engine of an ONNX file, and whether it can here; this needs no TensorRT."""

import importlib.util
from collections.abc import Collection, Sequence

import torch

from terrazzo.tools.export.checked import LARGER

Shape = tuple[int, ...]

BATCHES, SIDES = 4, 2
"""An engine with open sizes takes up to BATCHES times the example's batch, and sides from 1/SIDES to SIDES times
its."""

SMALLEST_SIDE = 32
"""Height and width that every backbone takes."""


def why_no_engine() -> str | None:
    """What this machine lacks to build an engine; None if nothing."""
    if not torch.cuda.is_available():
        return "no NVIDIA GPU that PyTorch can use"
    if importlib.util.find_spec("tensorrt") is None:
        return "the package tensorrt is not installed"
    return None


def ranges(
    names: Sequence[str], shapes: Sequence[Sequence[int]], dynamic: Collection[str]
) -> dict[str, tuple[Shape, Shape, Shape]]:
    """The shapes that an engine is for: for each input the smallest, the optimal and the largest.

    Args:
        names: the names of the inputs.
        shapes: the shapes of the example, B C H W each.
        dynamic: which of "batch" and "hw" are open; if neither is, the three shapes are equal.
    """
    found = {}
    for name, (batch, channels, *sides) in zip(names, shapes, strict=True):
        smallest, largest = [batch, channels, *sides], [batch, channels, *sides]
        if "batch" in dynamic:
            smallest[0], largest[0] = 1, BATCHES * batch
        if "hw" in dynamic:
            smallest[2:] = [max(side // SIDES, min(side, SMALLEST_SIDE)) for side in sides]
            largest[2:] = [max(SIDES * side, side + more) for side, more in zip(sides, LARGER)]
        found[name] = (tuple(smallest), (batch, channels, *sides), tuple(largest))
    return found


def trtexec(onnx: str, engine: str, shapes: dict[str, tuple[Shape, Shape, Shape]]) -> str:
    """The command that builds an engine as `tensorrt_engine` does: in the types of the file, float32 without TF32.

    Args:
        onnx: name of the ONNX file.
        engine: name of the engine.
        shapes: the result of `ranges`.
    """
    words = ["trtexec", f"--onnx={onnx}", f"--saveEngine={engine}", "--stronglyTyped", "--noTF32"]
    if any(smallest != largest for smallest, _, largest in shapes.values()):
        for place, kind in enumerate(("min", "opt", "max")):
            sizes = ",".join(f"{name}:{'x'.join(map(str, sizes[place]))}" for name, sizes in shapes.items())
            words.append(f"--{kind}Shapes={sizes}")
    return " ".join(words)
