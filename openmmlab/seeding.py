"""Randomness that depends only on the position in a training run.

PyTorch, NumPy and Python keep generators in every worker, and their state is lost with the process. Here each iteration
and each sample has its own seed, made from the run's seed and its place in the run. So a resumed run draws the same
numbers as an uninterrupted run, and a sample is augmented in the same way whichever process prepares it.
"""

import contextlib
import math
import numbers
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.dist import get_dist_info, sync_random_seed
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, DATASETS, HOOKS
from mmengine.runner import Runner, set_random_seed
from torch import nn
from torch.utils.data import Dataset, Sampler

from terrazzo.errors import InputError


def fold(*numbers: int) -> int:
    """One seed of 32 bits from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds Python's, NumPy's and PyTorch's CPU generators, and restores their states at the end."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class SeededIndex(int):
    """The index of a sample, with the seed of its augmentation."""

    seed: int


@DATA_SAMPLERS.register_module()
class SeededSampler(Sampler):
    """Gives each index that another sampler draws the seed of its place in the run.

    The place counts over all processes, so that two processes with half the batch see the same as one process.

    Args:
        sampler: the settings of the other sampler.
        dataset: the data set.
        seed: the run's seed; None draws one that all processes share.
        ranks_per_image: how many consecutive processes get the same samples.

    Raises:
        InputError: the other sampler is not known to give several processes the same samples.
    """

    def __init__(self, sampler: dict, dataset: Dataset, seed: int | None = None, ranks_per_image: int = 1):
        self.seed = sync_random_seed() if seed is None else seed
        inner = dataset.dataset if isinstance(dataset, SeededDataset) else dataset
        self.sampler = DATA_SAMPLERS.build(sampler, default_args=dict(dataset=inner, seed=seed))
        self.epoch = 0
        rank, processes = get_dist_info()
        self.group, self.groups = rank // ranks_per_image, processes // ranks_per_image
        if ranks_per_image > 1:
            _deal_to_groups(self.sampler, self.group, self.groups)

    def __getattr__(self, name: str) -> Any:
        if name == "sampler":  # not yet there, while the object is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.sampler, name)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        for position, index in enumerate(self.sampler):
            if not isinstance(index, numbers.Integral):
                yield index  # a frame of a video, in mmdet's trackers: it has no seed
                continue
            place = SeededIndex(index)
            place.seed = fold(self.seed, self.epoch, position * self.groups + self.group)
            yield place

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, here and in the other sampler."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def _deal_to_groups(sampler: Any, group: int, groups: int) -> None:
    """Makes a new sampler of mmengine, which deals samples to processes, deal them to groups of processes."""
    if type(sampler) not in (DefaultSampler, InfiniteSampler):
        raise InputError(
            f"--spatial gives groups of processes the same images; {type(sampler).__name__} is not known to do it, use "
            "InfiniteSampler or DefaultSampler"
        )
    sampler.rank, sampler.world_size = group, groups
    if isinstance(sampler, DefaultSampler):
        left_out = 0 if sampler.round_up else group
        sampler.num_samples = math.ceil((len(sampler.dataset) - left_out) / groups)
        sampler.total_size = sampler.num_samples * groups if sampler.round_up else len(sampler.dataset)


@DATASETS.register_module()
class SeededDataset(Dataset):
    """Wraps a data set so that its samples are prepared under the seeds of a `SeededSampler`.

    All other attributes are read from and set on the wrapped data set.

    Args:
        dataset: the settings of the wrapped data set.
    """

    def __init__(self, dataset: dict):
        self.__dict__["dataset"] = DATASETS.build(dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not yet there, while the object is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.dataset, name, value)  # hooks switch pipelines in the middle of a training

    def __getstate__(self) -> dict:
        return self.__dict__

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if not isinstance(index, SeededIndex):
            return self.dataset[index]
        with seeded(index.seed):
            return self.dataset[int(index)]


@HOOKS.register_module()
class SeedingHook(Hook):
    """Seeds each training iteration: dropout, stochastic depth, the samplers of detectors, mixup."""

    priority = "VERY_HIGH"

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seeds the generators before the model is run."""
        seed_iteration(runner)


def seed_iteration(runner: Runner) -> None:
    """Seeds the generators for the runner's iteration; processes that share images (`SpatialModel`) draw the same."""
    set_random_seed(fold(runner.seed, get_dist_info()[0] // ranks_per_image(runner.model), runner.iter))


def ranks_per_image(model: nn.Module) -> int:
    """How many processes share each image."""
    return getattr(model, "ranks_per_image", 1)


def configured_ranks(cfg: Config) -> int:
    """How many processes share each training image by a config, such as the config that a run has written."""
    loader = cfg.get("train_dataloader")
    sampler = loader.get("sampler") if isinstance(loader, dict) else None
    return (sampler or {}).get("ranks_per_image", 1)


def seed_config(cfg: Config) -> None:
    """Wraps the training data of a config, in place. A second call changes nothing."""
    loader = cfg.get("train_dataloader")
    if not isinstance(loader, dict) or not isinstance(loader.get("dataset"), dict) or not loader.get("sampler"):
        return
    if loader["sampler"].get("type") != "SeededSampler":
        loader["sampler"] = ConfigDict(type="SeededSampler", sampler=loader["sampler"])
        loader["dataset"] = ConfigDict(type="SeededDataset", dataset=loader["dataset"])
