"""Pictures of what a readout says: one position against all others."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from terrazzo._pictures import spread
from terrazzo.tools.predict.draw import panels
from terrazzo.tools.probe.objects.cells import on_grid
from terrazzo.tools.probe.objects.collect import Cells, Grid, levels_of
from terrazzo.tools.probe.objects.readouts import Sampled

_WIDTH = 320


@torch.inference_mode()
def similarity(
    model: nn.Module,
    data: Cells,
    level: int,
    grid: Grid,
    readout: nn.Module,
    by: Sampled,
    device: torch.device,
    most: int,
) -> Image.Image:
    """Pictures, each beside the readout's scores of a marked position with all positions; red is one object.

    Args:
        model: gives the maps.
        data: the pictures; some of them, spread over all.
        level, grid: which map, and the grid on which the readout was trained.
        readout: gives logits.
        by: the training positions, whose mean and deviation standardise features.
        device: where the model is.
        most: number of pictures.
    """
    mean, deviation = by.moments()
    shown, titles = [], []
    for index in spread(range(len(data)), most):
        found = on_grid(levels_of(model, data.image(index).to(device))[level], grid)[0].cpu()
        features = (found.flatten(1).T - mean) / deviation
        row, column = _middle_of_largest(data.labels(index, grid))
        logits = readout(features[None])[0, row * grid[1] + column].view(grid)
        picture = _cut(data, index)
        ratio = _WIDTH / picture.width
        small = picture.resize((_WIDTH, round(ratio * picture.height)), Image.Resampling.BICUBIC)
        mark = ((column + 0.5) * small.width / grid[1], (row + 0.5) * small.height / grid[0])
        for one in (small, _heat(logits.sigmoid().numpy(), small)):
            pen = ImageDraw.Draw(one)
            pen.ellipse([part + side * 5 for side in (-1, 1) for part in mark], outline=(0, 0, 0), fill=(255, 255, 255))
            shown.append(one)
        titles += [data.split.pictures[index].name, "one object with the mark"]
    return panels(shown, titles)


def _cut(data: Cells, index: int) -> Image.Image:
    """What the model sees of a picture."""
    mean, std = (torch.tensor(data.config[key])[:, None, None] for key in ("mean", "std"))
    pixels = (data.image(index)[0] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    return Image.fromarray((255 * pixels).round().astype(np.uint8))


def _middle_of_largest(labels: np.ndarray) -> tuple[int, int]:
    """The cell of the largest instance that is nearest to the mean of its cells; the grid's middle without any."""
    numbers, counts = np.unique(labels[labels > 0], return_counts=True)
    if not len(numbers):
        return labels.shape[0] // 2, labels.shape[1] // 2
    inside = np.argwhere(labels == numbers[counts.argmax()])
    row, column = inside[((inside - inside.mean(0)) ** 2).sum(1).argmin()]
    return int(row), int(column)


def _heat(shares: np.ndarray, picture: Image.Image) -> Image.Image:
    """The picture in grey under shares from 0, blue, to 1, red."""
    from matplotlib import colormaps

    colours = (255 * colormaps["coolwarm"](shares)[:, :, :3]).round().astype(np.uint8)
    large = Image.fromarray(colours).resize(picture.size, Image.Resampling.NEAREST)
    return Image.blend(picture.convert("L").convert("RGB"), large, 0.6)
