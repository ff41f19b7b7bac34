"""`terrazzo infer --show-tokens`: drawings show the model's real tokens."""

import itertools

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import terrazzo
from terrazzo.errors import InputError
from terrazzo.tools.predict.classifiers import timm_predictor
from terrazzo.tools.predict.tokens import TokenWatch, _panel


@pytest.fixture(scope="module")
def photo():
    """A sky without structure over coloured noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    pixels[:112] = (90, 160, 220)
    return Image.fromarray(pixels)


def watched(model, photo):
    predictor = timm_predictor(model, torch.device("cpu"))
    watch = TokenWatch(predictor)
    predictor.predict([photo])
    return watch


def test_merged_tokens(photo):
    torch.manual_seed(0)
    watch = watched(timm.create_model("mctf_deit_tiny_fast"), photo)
    stages = watch.stages()
    assert [(stage.block, stage.tokens) for stage in stages] == [(0, 196), (3, 128), (6, 84), (9, 55)]
    for before, after in itertools.pairwise(stages):
        # A token stays a single token.
        assert len(np.unique(np.stack([before.of.ravel(), after.of.ravel()]), axis=1).T) == before.tokens
    sky, noise = (len(np.unique(part)) for part in np.split(stages[1].of, 2))
    assert sky < noise
    assert watch.draw().width > 4 * 448


def test_tokens_of_a_reduced_model(photo):
    torch.manual_seed(0)
    model = terrazzo.reduce(timm.create_model("vit_tiny_patch16_224"), r=20, blocks=(2, 5))
    assert [stage.tokens for stage in watched(model, photo).stages()] == [196, 176, 156]


def test_tokens_of_windows(photo):
    torch.manual_seed(0)
    model = timm.create_model("mctf_deit_tiny", blocks=(3,), window=5)  # 9 windows of 5 x 5 exceed the map by a row
    stages = watched(model, photo).stages()
    assert [stage.tokens for stage in stages[:1]] == [196]
    windows = stages[-1].of.reshape(14, 14)
    corner = set(np.unique(windows[:5, :5]))
    assert not corner & set(np.unique(windows[5:]))
    assert not corner & set(np.unique(windows[:, 5:]))
    assert len(corner) == 25 - 12  # half of a window is merged


def test_dropped_tokens(photo):
    torch.manual_seed(0)
    model = timm.create_model("asvit_deit_tiny")
    with torch.no_grad():
        for threshold, value in zip(model.reducer.thresholds, (0.00504, 0.00505, 0.00506)):
            threshold.fill_(value)
    watch = watched(model, photo)
    counts = [stage.tokens for stage in watch.stages()]
    assert 196 == counts[0] > counts[-1] > 0
    last = watch.stages()[-1]
    assert (last.of < 0).sum() == 196 - last.tokens


def test_colours():
    of = np.array([[0, 0], [1, -1]])
    pixels = np.zeros((4, 4, 3))
    pixels[:2, :2], pixels[:2, 2:], pixels[2:, :2], pixels[2:, 2:] = 0.2, 0.6, 0.8, 1.0
    drawn = np.asarray(_panel(pixels, of))
    inner = drawn[10, 10], drawn[10, -10], drawn[-10, 10], drawn[-10, -10]
    assert [int(colour[0]) for colour in inner] == [102, 102, 204, 64]
    assert (drawn[drawn.shape[0] // 2 - 1, 10] == 250).all()  # a line between the upper and the lower tokens


def test_command(run, picture, tmp_path):
    result = run("infer", "mctf_deit_tiny_fast", picture, "--show-tokens", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "floor.tokens.jpg").width > 1000


def test_refusals(run, refused, picture, tmp_path):
    with pytest.raises(InputError, match="merges and drops no tokens"):
        TokenWatch(timm_predictor(timm.create_model("resnet10t"), torch.device("cpu")))
    result = run("infer", "resnet10t", picture, "--show-tokens", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "drops no tokens" in result.stderr.splitlines()[-1]
    assert "--show-tokens" in refused("infer", "--runtime", "onnx", picture, picture, "--show-tokens")
