"""Features of sampled cells: of every level of a model, and of the controls that any probe needs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from terrazzo.tools.data.instances import InstanceSplit
from terrazzo.tools.data.pictures import to_tensor
from terrazzo.tools.inspect.maps import maps_at
from terrazzo.tools.probe.objects.cells import UNUSED, cells, filled_up, fitted, on_grid, sample
from terrazzo.tools.probe.objects.readouts import Sampled

STRIDE = 16
"""The stride of the grid on which levels with different strides are compared."""
_PATCH = 8
_FREQUENCIES = 4
Grid = tuple[int, int]
Key = tuple[int, bool]
"""A level, and whether it is on the common grid."""


@dataclass(frozen=True)
class Sampling:
    """Which cells are drawn.

    Attributes:
        size: (H, W) of the images.
        count: cells of a picture, at most.
        background: whether cells of the background are drawn, too; they count as one object.
        seed: of the draw.
    """

    size: tuple[int, int]
    count: int = 64
    background: bool = False
    seed: int = 0


class Cells:
    """Pictures of a split as tensors, with the instances of their cells.

    Args:
        split: pictures and instances.
        config: timm's data config, with mean and std of colours.
        sampling: which cells are drawn.
    """

    def __init__(self, split: InstanceSplit, config: Mapping[str, Any], sampling: Sampling):
        self.split, self.config, self.sampling = split, config, sampling
        self.drawn: dict[tuple[int, Grid], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.usable: dict[Grid, list[float]] = {}

    def __len__(self) -> int:
        return len(self.split.pictures)

    def image(self, index: int) -> Tensor:
        """(1, 3, H, W), cut from the middle of the picture."""
        picture = self.split.pictures[index].read()
        return to_tensor(picture, self.sampling.size, self.config["mean"], self.config["std"], crop=True)

    def cells(self, index: int, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The drawn cells of a picture, as indices into the flat grid; their objects and categories."""
        if (index, grid) not in self.drawn:
            labels, categories = self._known(index, grid)
            self.usable.setdefault(grid, []).append(float((labels != UNUSED).mean()))
            seed = self.sampling.seed * 1_000_003 + index
            taken = sample(labels, self.sampling.background, self.sampling.count, seed)
            objects = labels.ravel()[taken]
            self.drawn[index, grid] = taken, objects, categories[objects]
        return self.drawn[index, grid]

    def labels(self, index: int, grid: Grid) -> np.ndarray:
        """The object of each cell (h, w), as `cells` of `terrazzo.tools.probe.objects.cells` gives it."""
        return self._known(index, grid)[0]

    def _known(self, index: int, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
        picture = self.split.pictures[index].read()
        numbers, categories = self.split.instances(index, (picture.height, picture.width))
        return cells(fitted(numbers, self.sampling.size), grid), categories

    def sampled(self, grid: Grid, features: Sequence[Tensor]) -> Sampled:
        """The drawn cells of all pictures with their features, a tensor (cells, channels) for each picture."""
        found = [self.cells(index, grid) for index in range(len(self))]
        places = [np.stack(np.divmod(taken, grid[1]), axis=-1) for taken, _, _ in found]
        objects, categories = ([torch.from_numpy(x[i]) for x in found] for i in (1, 2))
        return filled_up(features, objects, categories, [torch.from_numpy(place) for place in places])


@torch.inference_mode()
def levels_of(model: nn.Module, image: Tensor) -> list[Tensor]:
    """Every map that a model gives (1, C, h, w): of each block, or of each stage of a pyramid. See `maps_at`."""
    return maps_at(model, image)


def of_model(
    model: nn.Module, data: Cells, device: torch.device, done: Callable[[], None]
) -> dict[Key, tuple[Grid, Sampled]]:
    """The drawn cells' features in every level, by level: on its own grid and, in a pyramid, on the common one."""
    kept: dict[Key, list[Tensor]] = {}
    grids: dict[Key, Grid] = {}
    for index in range(len(data)):
        maps = levels_of(model, data.image(index).to(device))
        for key, found in _on_grids(maps, data.sampling.size):
            grid = grids.setdefault(key, (found.shape[2], found.shape[3]))
            taken, _, _ = data.cells(index, grid)
            # In half precision, as a data set's features of all levels are many.
            kept.setdefault(key, []).append(found[0].flatten(1).T[torch.from_numpy(taken)].half().cpu())
        done()
    return {key: (grids[key], data.sampled(grids[key], [x.float() for x in kept[key]])) for key in kept}


def _on_grids(maps: Sequence[Tensor], size: tuple[int, int]) -> Iterator[tuple[Key, Tensor]]:
    common = (max(1, size[0] // STRIDE), max(1, size[1] // STRIDE))
    alike = len({tuple(found.shape[2:]) for found in maps}) == 1
    for level, found in enumerate(maps):
        yield (level, False), found
        if not alike:
            yield (level, True), on_grid(found, common)


def of_place(data: Cells, grid: Grid) -> Sampled:
    """Control: where the cell is, as 18 Fourier features of its row and column."""
    features = []
    for index in range(len(data)):
        taken, _, _ = data.cells(index, grid)
        place = torch.from_numpy(np.stack(np.divmod(taken, grid[1]), axis=-1)).float()
        place = (place + 0.5) / torch.tensor(grid)
        waves = [f(2**n * torch.pi * place) for n in range(_FREQUENCIES) for f in (torch.sin, torch.cos)]
        features.append(torch.cat([place, *waves], dim=1))
    return data.sampled(grid, features)


def of_pixels(data: Cells, grid: Grid) -> Sampled:
    """Control: the colours of the cell, averaged to 8 x 8 values of each."""
    features = []
    for index in range(len(data)):
        taken, _, _ = data.cells(index, grid)
        small = F.adaptive_avg_pool2d(data.image(index), (_PATCH * grid[0], _PATCH * grid[1]))
        features.append(F.unfold(small, _PATCH, stride=_PATCH)[0].T[torch.from_numpy(taken)])
    return data.sampled(grid, features)
