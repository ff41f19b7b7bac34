"""Which object a cell of a map shows, and a sample of the cells of each picture."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from terrazzo.tools.probe.objects.readouts import Sampled

UNUSED = -1
_MOST = 0.5


def fitted(numbers: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map of instances as `to_tensor(crop=True)` cuts its picture, without values between instances."""
    return np.asarray(ImageOps.fit(Image.fromarray(numbers), size[::-1], Image.Resampling.NEAREST))


def cells(numbers: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The instance that covers at least half of each cell; `UNUSED` where none does.

    Args:
        numbers: (H, W), instances by pixel; 0 is the background.
        grid: (h, w), at most H and W.
    """
    edges = [np.linspace(0, side, count + 1).round().astype(int) for side, count in zip(numbers.shape, grid)]
    areas = np.diff(edges[0])[:, None] * np.diff(edges[1])[None]
    found = np.full(grid, UNUSED, np.int64)
    for number in np.unique(numbers):
        rows = np.add.reduceat((numbers == number).astype(np.int64), edges[0][:-1], axis=0)
        covered = np.add.reduceat(rows, edges[1][:-1], axis=1)
        found[covered >= _MOST * areas] = number
    return found


def sample(labels: np.ndarray, background: bool, count: int, seed: int) -> np.ndarray:
    """Cells drawn without replacement, as indices into the flat map; fewer if the picture has fewer.

    Args:
        labels: of `cells`.
        background: whether cells of the background are drawn, too.
        count: number of cells.
        seed: the same seed and labels give the same cells.
    """
    usable = np.flatnonzero(labels >= (0 if background else 1))
    return np.random.default_rng(seed).permutation(usable)[:count]


def on_grid(found: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map (1, C, h, w) on another grid: means of finer cells, the nearest of coarser cells."""
    if tuple(found.shape[2:]) == grid:
        return found
    if found.shape[2] >= grid[0] and found.shape[3] >= grid[1]:
        return F.adaptive_avg_pool2d(found, grid)
    return F.interpolate(found, grid, mode="nearest-exact")


def filled_up(
    features: Sequence[Tensor], objects: Sequence[Tensor], categories: Sequence[Tensor], places: Sequence[Tensor]
) -> Sampled:
    """Samples of pictures, of any number each, as one."""
    pad = torch.nn.utils.rnn.pad_sequence
    return Sampled(
        pad(list(features), batch_first=True),
        pad(list(objects), batch_first=True, padding_value=UNUSED),
        pad(list(categories), batch_first=True),
        pad(list(places), batch_first=True),
    )
