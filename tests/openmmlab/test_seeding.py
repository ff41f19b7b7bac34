"""Random seeds depend only on the place in a run."""

import copy
import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from torch.utils.data import DataLoader, Dataset, RandomSampler

from terrazzo.errors import InputError
from terrazzo.openmmlab.seeding import SeededDataset, SeededIndex, SeededSampler, fold, seed_config, seeded


@pytest.fixture(scope="module", autouse=True)
def noise():
    @DATASETS.register_module(name="Noise")
    class Noise(Dataset):
        metainfo = {"classes": ("a",)}
        amplitude = 1.0

        def __len__(self):
            return 12

        def __getitem__(self, index):
            values = [np.random.rand(), random.random(), float(torch.rand(1)), float(index)]
            return torch.tensor(values) * self.amplitude

    yield
    DATASETS.module_dict.pop("Noise")


def batches(workers, epoch=0, seed=3):
    dataset = SeededDataset(dict(type="Noise"))
    sampler = SeededSampler(dict(type="DefaultSampler", shuffle=True), dataset, seed)
    sampler.set_epoch(epoch)
    return torch.cat(list(DataLoader(dataset, batch_size=4, sampler=sampler, num_workers=workers)))


def test_samples_do_not_depend_on_workers():
    torch.testing.assert_close(batches(0), batches(2), rtol=0, atol=0)
    assert len(batches(0)[:, 0].unique()) == 12
    assert not torch.equal(batches(0).sort(dim=0).values, batches(0, epoch=1).sort(dim=0).values)
    assert not torch.equal(batches(0).sort(dim=0).values, batches(0, seed=4).sort(dim=0).values)


@pytest.mark.parametrize(
    "settings",
    [
        dict(type="DefaultSampler"),
        dict(type="DefaultSampler", shuffle=False, round_up=False),
        dict(type="InfiniteSampler"),
    ],
)
def test_processes_that_share_images_draw_the_same(settings, monkeypatch):
    """Two groups of three processes draw what two processes draw."""

    def drawn(rank, processes, **options):
        for module in ("terrazzo.openmmlab.seeding", "mmengine.dataset.sampler"):
            monkeypatch.setattr(f"{module}.get_dist_info", lambda: (rank, processes))
        sampler = SeededSampler(settings, SeededDataset(dict(type="Noise")), 3, **options)
        assert len(sampler) == (12 if settings["type"] == "InfiniteSampler" else 6)
        return [(int(index), index.seed) for index in itertools.islice(sampler, 6)]

    wanted = [drawn(rank, 2) for rank in range(2)]
    assert wanted[0] != wanted[1]
    assert [drawn(rank, 6, ranks_per_image=3) for rank in range(6)] == [wanted[0]] * 3 + [wanted[1]] * 3


def test_other_samplers_cannot_share_images():
    with pytest.raises(InputError, match="RandomSampler is not known"):
        SeededSampler(dict(type=lambda dataset, seed: RandomSampler(dataset)), SeededDataset(dict(type="Noise")), 3, 2)


def test_generators_are_put_back():
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with seeded(1):
        first = random.random(), np.random.rand(), torch.rand(1)
    with seeded(1):
        assert (random.random(), np.random.rand(), torch.rand(1)) == first
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


def test_index_and_data_set_pass_to_other_processes():
    index = SeededIndex(7)
    index.seed = 99
    found = pickle.loads(pickle.dumps(index))
    assert (found, found.seed, type(found)) == (7, 99, SeededIndex)
    dataset = SeededDataset(dict(type="Noise"))
    copied = copy.deepcopy(dataset)
    assert len(copied) == 12
    assert copied.metainfo == {"classes": ("a",)}
    torch.testing.assert_close(copied[found], dataset[found], rtol=0, atol=0)


def test_attributes_are_those_of_the_other_data_set():
    dataset = SeededDataset(dict(type="Noise"))
    dataset.amplitude = 0.0  # hooks that switch the pipeline set attributes, too
    assert dataset.dataset.amplitude == 0
    assert dataset[3].abs().max() == 0
    with pytest.raises(AttributeError):
        _ = dataset.nothing


def test_indices_that_are_no_numbers_pass():
    class Pairs(list):
        pass

    sampler = SeededSampler(dict(type="DefaultSampler", shuffle=False), SeededDataset(dict(type="Noise")), 0)
    sampler.sampler = Pairs([(0, 1), 2])
    pair, number = sampler
    assert pair == (0, 1)
    assert number.seed == fold(0, 0, 1)


def test_config_is_changed_once():
    loader = dict(sampler=dict(type="DefaultSampler", shuffle=True), dataset=dict(type="Noise"), batch_size=2)
    cfg = Config(dict(train_dataloader=loader))
    seed_config(cfg)
    once = copy.deepcopy(cfg.to_dict())
    seed_config(cfg)
    assert cfg.to_dict() == once
    assert cfg.train_dataloader.dataset.dataset.type == "Noise"
    assert cfg.train_dataloader.sampler.sampler.shuffle is True
    empty = Config(dict(model=dict()))
    seed_config(empty)
    assert empty.to_dict() == {"model": {}}
