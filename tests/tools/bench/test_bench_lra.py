"""`terrazzo bench lra` trains mixers on a task with one recipe, and names what it cannot do."""

import math

import numpy as np
import pytest
import torch

import terrazzo
from terrazzo.errors import BackendError
from terrazzo.tools import results
from terrazzo.tools.bench.lra import benchmark, hosts, training
from terrazzo.tools.bench.lra.tasks import ACCURACY, IOU, PATH_ACCURACY, TASKS, Split
from terrazzo.tools.data.listops import TOKENS, listops
from terrazzo.tools.data.paths import paths
from terrazzo.tools.data.paths.folders import read_pairs


class FirstPixel(torch.nn.Module):
    """Two logits from the first pixel."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 2)

    def forward(self, x):
        return self.layer(x[:, :, 0, 0])


@pytest.fixture
def toy():
    """Images whose first pixel is the answer."""
    inputs = torch.zeros(64, 32, 32, dtype=torch.uint8)
    inputs[::2, 0, 0] = 255
    return Split(inputs, (inputs[:, 0, 0] > 0).long())


@pytest.fixture
def broken(monkeypatch):
    """Nothing can train these networks."""
    names = set()
    measure = benchmark._measure

    def fail(entry, *given):
        if entry.name in names:
            raise BackendError("no kernel runs here")
        return measure(entry, *given)

    monkeypatch.setattr(benchmark, "_measure", fail)
    return names


@pytest.mark.long
def test_rows_and_table(run, tmp_path, monkeypatch, broken):
    monkeypatch.chdir(tmp_path)
    out, data = tmp_path / "rows.csv", tmp_path / "data" / "lra" / "pathfinder32-4-3-seed1"
    broken.add("ssd")
    options = ("--seconds", 0.1, "--train", 4, "--test", 3, "--batch", 2, "--patch", 8, "--seed", 1)
    chosen = ("--mixer", "softmax", "--mixer", "ssd", "--stages", "hedgehog,softmax,softmax,softmax")
    done = run("bench", "lra", "pathfinder32", *chosen, *options, "--device", "cpu", "--out", out)
    assert done.exit_code == 0, done.output
    rows = {(row.backend, row.metric): row.p50 for row in results.read(out)}
    names = {name for name, _ in rows}
    assert names == {"softmax", "pyramid hedgehog/softmax/softmax/softmax"}
    for name in names:
        assert rows[name, "steps"] >= 1
        for split in ("train", "test"):
            right = rows[name, f"{split} accuracy"] * 3 / 100
            assert right == pytest.approx(round(right), abs=1e-3)
    assert "not run: ssd: BackendError: no kernel runs here" in done.output
    assert "chance is 50" in done.output
    kept, _ = read_pairs(data, "train")
    assert np.array_equal(kept, [image.image for image in paths(32, 4, seed=1)])


def test_if_nothing_ran(refused, tmp_path, broken):
    broken |= {"softmax", "ssd"}
    options = ("--seconds", 0.1, "--train", 2, "--test", 1, "--device", "cpu", "--data", tmp_path / "data")
    found = refused("bench", "lra", "pathfinder32", "--mixer", "ssd", "--mixer", "softmax", *options)
    assert "no network could be measured; ssd: BackendError: no kernel runs here" in found


def test_training_learns_and_scores(toy):
    torch.manual_seed(0)
    task, network, told = TASKS["pathfinder32"], FirstPixel(), []
    before = network.layer.weight.detach().clone()
    steps = training.train(network, task, toy, training.Budget(0.4, 16, 0), torch.device("cpu"), told.append)
    assert steps == len(told) > 0
    assert told == sorted(told)
    assert told[-1] == 1
    assert not torch.equal(before, network.layer.weight)
    with torch.no_grad():
        network.layer.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        network.layer.bias.zero_()
    assert training.evaluate(network, task, toy, 10, torch.device("cpu")) == {ACCURACY: 100}
    with torch.no_grad():
        network.layer.weight.zero_()
        network.layer.bias.copy_(torch.tensor([0.0, 1.0]))
    assert training.evaluate(network, task, toy, 10, torch.device("cpu")) == {ACCURACY: 50}
    network.layer.weight.data.fill_(math.nan)
    with pytest.raises(terrazzo.TerrazzoError, match="the loss is nan at step 1"):
        training.train(network, task, toy, training.Budget(0.1, 16, 0), torch.device("cpu"), told.append)


def test_rates():
    assert training.rate(0) == 0
    assert training.rate(training.WARM_UP) == pytest.approx(training.RATE, rel=0.01)
    assert training.rate(0.5) == pytest.approx(training.RATE / 2, rel=0.01)
    assert training.rate(1.2) == pytest.approx(0)


def test_scores_of_the_dense_form():
    made = list(paths(64, 4, 6, dense=True))
    classes = torch.tensor(np.stack([image.classes for image in made]).astype(np.int64))
    split = Split(classes, classes, torch.tensor(np.stack([image.instances for image in made]).astype(np.int64)))
    task = TASKS["paths64"]

    def scores(found):
        logits = torch.nn.functional.one_hot(found, 3).permute(0, 3, 1, 2).float()
        sums = task.scores(logits, split)
        return float(sums[PATH_ACCURACY][0] / 4), float(sums[IOU][0] / sums[IOU][1].clamp(min=1))

    assert scores(classes) == (1, 1)
    assert scores(torch.zeros_like(classes)) == (0.5, 0)
    first = (split.instances == 1).long()
    assert scores(first)[0] == np.mean([image.marked == 1 for image in made])


@pytest.mark.parametrize("name", ["paths64", "listops"])
def test_hosts_fit_their_tasks(name):
    """Logits of every pixel, at sides that patches do not divide, too; tokens become channels."""
    task = TASKS[name]
    inputs = torch.zeros(2, 64, 62, dtype=torch.uint8) if task.dense else torch.tensor(listops(2, 0, 0, 10, 60)[0])
    encoded = task.encoded(inputs)
    wanted = (2, 3, 64, 62) if task.dense else (2, 10)
    found = [hosts.vit("hedgehog"), *([hosts.pyramid("softmax,softmax,softmax,softmax")] if task.dense else [])]
    for entry in found:
        assert entry.build(task, 8 if task.dense else 1)(encoded).shape == wanted
    if not task.dense:
        assert encoded.shape == (2, len(TOKENS), 1, 60)
        assert torch.equal(encoded.sum(1).squeeze(1), (inputs > 0).float())
        with pytest.raises(terrazzo.TerrazzoError, match="needs a map"):
            hosts.pyramid("softmax,softmax,softmax,softmax").build(task, 1)


def test_every_mixer_takes_part():
    found = [entry.name for entry in hosts.entries((), (), TASKS["pathfinder32"])]
    assert found[: len(terrazzo.mixers())] == list(terrazzo.mixers())
    assert "pyramid llsa/llsa/softmax/softmax" in found
    assert len(hosts.entries((), (), TASKS["listops"])) == len(terrazzo.mixers())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("text",), "the task text is left out: it needs the reviews of IMDB"),
        (("retrieval",), "the task retrieval is left out: it needs pairs of papers"),
        (("butter",), "no task is called 'butter'; the tasks are pathfinder32"),
        (("pathfinder32", "--mixer", "butter"), "mixer must be one of"),
        (("pathfinder32", "--stages", "na,na"), "a mixer for each of 4 stages"),
        (
            ("pathfinder32", "--mixer", "softmax", "--mixer", "na,kernel=x"),
            "na,kernel=x: kernel must be an int, got 'x'",
        ),
        (("listops", "--stages", "na,na,na,na"), "pyramid na/na/na/na: a pyramid needs a map"),
        (("listops", "--data", "here"), "--data is for tasks with images, and listops has none"),
        (("listops", "--workers", 1), "--workers is for tasks with images, and listops has none"),
        (("pathfinder32", "--out", "."), "is a folder"),
    ],
)
def test_refusals(refused, tmp_path, monkeypatch, arguments, words):
    """They come before any data is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "steps", None)
    assert words in refused("bench", "lra", *arguments)
    assert not list(tmp_path.iterdir())
