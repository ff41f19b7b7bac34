"""The linear probe: BatchNorm and a 1x1 convolution on maps of a frozen model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.errors import InputError
from terrazzo.tools.probe.features import Maps


@dataclass(frozen=True)
class Recipe:
    """How a probe is trained: AdamW with a cosine schedule.

    Attributes:
        steps: number of batches.
        batch: pictures of a batch.
        rate: learning rate at the beginning.
        decay: weight decay.
        seed: of the weights and of the order of the pictures.
    """

    steps: int = 400
    batch: int = 8
    rate: float = 1e-3
    decay: float = 1e-2
    seed: int = 0


class LinearProbe(nn.Module):
    """Logits for the pixels of pictures, from maps (B, C, h, w)."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(B, classes, H, W), enlarged between the positions of the map."""
        return F.interpolate(self.head(self.norm(maps)), size, mode="bilinear")


def fit(
    maps: Maps,
    labels: torch.Tensor,
    classes: int,
    ignored: int,
    recipe: Recipe,
    device: torch.device,
    done: Callable[[], None],
) -> LinearProbe:
    """Train a probe; the same arguments give the same probe on the same machine.

    Args:
        maps: of the training pictures.
        labels: (N, H, W) uint8.
        classes: number of classes.
        ignored: the label of pixels that do not count.
        recipe: how to train.
        device: where to train.
        done: called after each step.
    """
    channels, *grid = maps.kept.shape[1:]
    if min(len(maps), recipe.batch) * grid[0] * grid[1] < 2:
        raise InputError("a single position is too little to train on: take a larger --size, or more pictures")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        probe = LinearProbe(channels, classes).to(device).train()
    optimizer = torch.optim.AdamW(probe.parameters(), recipe.rate, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    for batch in _batches(len(maps), recipe):
        wanted = labels[batch].to(device).long()
        logits = probe(maps[batch].to(device), tuple(wanted.shape[1:]))
        loss = F.cross_entropy(logits, wanted, ignore_index=ignored, reduction="sum")
        loss = loss / (wanted != ignored).sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        done()
    return probe.eval()


def _batches(count: int, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Indices of the pictures for each step: every picture once before any comes again."""
    generator = torch.Generator().manual_seed(recipe.seed)
    queue: list[int] = []
    for _ in range(recipe.steps):
        if len(queue) < recipe.batch:
            queue += torch.randperm(count, generator=generator).tolist()
        taken, queue = queue[: recipe.batch], queue[recipe.batch :]
        yield torch.tensor(taken)


class Scores:
    """mIoU and pixel accuracy over pictures, in percent. Classes that occur nowhere do not count."""

    def __init__(self, classes: int, ignored: int):
        from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

        given = {"num_classes": classes, "ignore_index": ignored, "validate_args": False}
        self.iou = MulticlassJaccardIndex(average="macro", **given)
        self.accuracy = MulticlassAccuracy(average="micro", **given)

    def add(self, predicted: torch.Tensor, wanted: torch.Tensor) -> None:
        """Count the pixels of label maps (H, W)."""
        for metric in (self.iou, self.accuracy):
            metric.update(predicted[None], wanted[None])

    def percent(self) -> tuple[float, float]:
        """mIoU and pixel accuracy."""
        return 100 * self.iou.compute().item(), 100 * self.accuracy.compute().item()


@torch.inference_mode()
def predict(probe: LinearProbe, found: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The label map (H, W), int64 on the CPU, of one map (C, h, w) on the probe's device."""
    return probe(found[None].float(), tuple(size)).argmax(1)[0].cpu()
