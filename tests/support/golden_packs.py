"""Golden packs: outputs of official implementations with random parameters; a parameter's name seeds its values.

A pack (`tests/golden/<family>/<variant>[.<task>].npz`) names every parameter of the official state dict and holds the
official logits and samples of the official maps. `weights` draws the parameters, and `image` draws the input.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1] / "golden"


def _generator(key: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF)


def normal(key: str, shape: Sequence[int]) -> torch.Tensor:
    """The normal numbers that belong to a string."""
    return torch.from_numpy(_generator(key).standard_normal(tuple(shape)))


def sampled(name: str, x: torch.Tensor) -> torch.Tensor:
    """The 256 values of a larger tensor that a pack of an operator stores under this name."""
    index = _generator(f"sample:{name}").randint(0, x.numel(), 256)
    return x.reshape(-1)[torch.from_numpy(index)]


def _parameter(name: str, shape: list[int]) -> np.ndarray:
    drawn = np.asarray(_generator(name).standard_normal(tuple(shape)))
    leaf, real = name.rsplit(".", 1)[-1], [size for size in shape if size != 1]
    if leaf == "running_var":
        return 1 + 0.2 * np.abs(drawn)
    if len(real) <= 1:
        return 0.1 * drawn + (leaf in ("weight", "D", "Ds") or leaf.startswith("gamma"))
    if shape[0] == 1:
        return drawn / np.sqrt(shape[-1])
    return drawn / np.sqrt(np.prod(shape[1:]))


class Pack:
    """A pack: `meta` as stored, and `arrays` by "<H>x<W>.logits" or "<H>x<W>.stage<i>"."""

    def __init__(self, path: Path):
        self.arrays = dict(np.load(path))
        self.meta: dict[str, Any] = json.loads(bytes(self.arrays.pop("meta")))

    def weights(self) -> dict[str, torch.Tensor]:
        """The official state dict, in its order."""
        given, factors = self.meta.get("given", {}), self.meta.get("factors", {})
        return {
            name: torch.from_numpy(np.asarray(given[name] if how == "given" else _parameter(name, shape)))
            * next((factor for ending, factor in factors.items() if name.endswith(ending)), 1)
            for name, shape, how in self.meta["state"]
            if how != "kept"
        }

    def image(self, case: dict[str, Any]) -> torch.Tensor:
        height, width = case["size"]
        shape = (case["batch"], 3, height, width)
        key = f"input:{shape[0]}x3x{height}x{width}"
        return torch.from_numpy(_generator(key).standard_normal(shape))

    def sample(self, case: dict[str, Any], stage: int, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sampled values of our map of a stage, and the official values."""
        key = f"{case['size'][0]}x{case['size'][1]}.stage{stage}"
        index = _generator(f"sample:{key}").randint(0, features.numel(), 256)
        return features.detach().reshape(-1)[torch.from_numpy(index)], torch.from_numpy(self.arrays[key])

    def logits(self, case: dict[str, Any]) -> torch.Tensor:
        return torch.from_numpy(self.arrays[f"{case['size'][0]}x{case['size'][1]}.logits"])


def packs(family: str) -> list[Path]:
    return sorted((ROOT / family).glob("*.npz"))
