"""The tasks: their data, and the scores of answers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from terrazzo.errors import InputError
from terrazzo.tools.data.listops import TOKENS, listops
from terrazzo.tools.data.paths.folders import Asked, kept_paths, read_dense, read_pairs

ACCURACY, PATH_ACCURACY, IOU = "accuracy", "path accuracy", "IoU of the path"

ABSENT = {
    "text": "it needs the reviews of IMDB, which terrazzo cannot make up",
    "retrieval": "it needs pairs of papers from the ACL Anthology, which terrazzo cannot make up",
    "image": "it needs CIFAR-10, which terrazzo cannot make up",
}
"""The other tasks of Long Range Arena, and why they are left out."""


@dataclass(frozen=True)
class Split:
    """Data of a split: inputs (n, ...) uint8, targets (n, ...) int64, contours of dense targets (n, H, W) or None."""

    inputs: torch.Tensor
    targets: torch.Tensor
    instances: torch.Tensor | None = None

    def first(self, count: int) -> "Split":
        """The first examples."""
        return Split(*(None if x is None else x[:count] for x in (self.inputs, self.targets, self.instances)))


@dataclass(frozen=True)
class Task:
    """What is to be learnt.

    Attributes:
        name: as a user writes it.
        grid: height and width of the map of tokens; a sequence has one row.
        channels: of the host's input.
        classes: of an answer.
        dense: whether every pixel has an answer.
        chance: the score in percent of answers that do not look.
        load: from a folder for images, counts of both splits, a seed, workers and a callback to training and test data.
            A sequence needs neither the folder nor workers.
    """

    name: str
    grid: tuple[int, int]
    channels: int
    classes: int
    dense: bool
    chance: float
    load: Callable[..., tuple[Split, Split]]

    @property
    def sequence(self) -> bool:
        """Whether the input is a sequence and not an image."""
        return self.grid[0] == 1

    def encoded(self, inputs: torch.Tensor) -> torch.Tensor:
        """The host's input (B, channels, H, W): grey values from -1 to 1, or tokens as channels, padding as zeros."""
        if self.channels == 1:
            return inputs[:, None].float() / 127.5 - 1
        return F.one_hot(inputs.long(), self.channels + 1)[..., 1:].float().transpose(1, 2).unsqueeze(2)

    def scores(self, outputs: torch.Tensor, split: Split) -> dict[str, torch.Tensor]:
        """Sums over a batch, by score: of right answers, or for the IoU of pixels in both and in either.

        Args:
            outputs: logits (B, classes) or (B, classes, H, W).
        """
        found = outputs.argmax(1)
        if not self.dense:
            return {ACCURACY: (found == split.targets).double().sum()[None]}
        found, path = found == 1, split.targets == 1
        long = torch.stack([split.instances == number for number in (1, 2)], 1).flatten(2).double()  # B 2 HW
        shares = (long * found.flatten(1)[:, None]).sum(2) / long.sum(2)
        marked = (long * path.flatten(1)[:, None]).sum(2) > 0
        ahead = torch.where(marked[:, 0], shares[:, 0] - shares[:, 1], shares[:, 1] - shares[:, 0])
        return {
            PATH_ACCURACY: (0.5 * (1 + ahead.sign())).sum()[None],
            IOU: torch.stack([(found & path).sum(), (found | path).sum()]).double(),
        }


def _pairs(size: int) -> Task:
    def load(root: Path, train: int, test: int, seed: int, workers: int, done: Callable[[], None]):
        root = kept_paths(root, Asked(size, False, {"train": train, "test": test}, seed=seed), workers, done)
        return tuple(Split(*map(torch.as_tensor, read_pairs(root, split))) for split in ("train", "test"))

    return Task(f"pathfinder{size}", (size, size), 1, 2, False, 50.0, load)


def _dense(size: int) -> Task:
    def load(root: Path, train: int, test: int, seed: int, workers: int, done: Callable[[], None]):
        root = kept_paths(root, Asked(size, True, {"train": train, "val": test}, seed=seed), workers, done)
        made = [read_dense(root, split) for split in ("train", "val")]
        return tuple(
            Split(torch.as_tensor(images), *(torch.as_tensor(x.astype(np.int64)) for x in more))
            for images, *more in made
        )

    return Task(f"paths{size}", (size, size), 1, 3, True, 50.0, load)


def _listops(root: Path | None, train: int, test: int, seed: int, workers: int, done: Callable[[], None]):
    made = [listops(count, seed, split) for split, count in enumerate((train, test))]
    for _ in range(train + test):
        done()
    return tuple(Split(*map(torch.as_tensor, part)) for part in made)


TASKS = {
    task.name: task
    for task in (
        *map(_pairs, (32, 64, 128, 256)),
        *map(_dense, (64, 128, 256)),
        Task("listops", (1, 2000), len(TOKENS), 10, False, 10.0, _listops),
    )
}
"""The tasks by name. Padding of ListOps is not masked: mixers take no mask, and all see the same."""


def task(name: str) -> Task:
    """The task of a name.

    Raises:
        InputError: there is no task of this name, or its data cannot be had; the message says why.
    """
    if name in ABSENT:
        raise InputError(f"the task {name} is left out: {ABSENT[name]}; the tasks are {', '.join(TASKS)}")
    if name not in TASKS:
        raise InputError(f"no task is called {name!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[name]
