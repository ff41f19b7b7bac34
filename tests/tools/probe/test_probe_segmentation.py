"""`terrazzo probe segmentation`: maps are computed once, a probe learns, and the figures become rows and a picture."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.data.labelled import read_labelled
from terrazzo.tools.probe.features import Maps
from terrazzo.tools.probe.linear import LinearProbe, Recipe, Scores, fit, predict

MODEL = "test_vit"
SIZE = ("--size", 64, 96)
COLOURS = np.array([(200, 30, 30), (30, 200, 30), (30, 30, 200)], np.uint8)


@pytest.fixture
def root(tmp_path):
    """Pictures of three plain colours, in CamVid's layout; the colour is the class."""
    random = np.random.default_rng(0)
    folder = tmp_path / "colours"
    for split, count in (("train", 4), ("val", 3)):
        for index in range(count):
            labels = random.integers(0, 3, (4, 6), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
            labels[:3] = 255
            for kind, name, pixels in (
                ("images", f"{index}.jpg", COLOURS[labels % 3]),
                ("labels", f"{index}.png", labels),
            ):
                (folder / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / kind / split / name)
    return folder


@pytest.mark.long
def test_rows_picture_and_table(run, root, tmp_path):
    out = tmp_path / "out"
    mechanisms = ("--mixer", "llsa,level=1", "--reduce", "mctf,r=4", "--fit", "both")
    done = run("probe", "segmentation", MODEL, "--data-root", root, *SIZE, *mechanisms, "--steps", 30, "--out", out)
    assert done.exit_code == 0, done.output
    rows = results.read(out / "segmentation.csv")
    names = ["dense", *(n + o for n in ("llsa,level=1", "mctf,r=4") for o in ("", ", own probe"))]
    assert list(dict.fromkeys(row.backend for row in rows)) == names
    assert all(name in done.output for name in names)
    found = {(row.backend, row.metric): row.p50 for row in rows}
    assert {row.metric for row in rows} == {"mIoU", "pixel accuracy", "cosine of the map"}
    assert found["dense", "cosine of the map"] == pytest.approx(1, abs=1e-3)
    # Small maps have softmax attention, so the mixer changes nothing.
    assert found["llsa,level=1", "mIoU"] == pytest.approx(found["dense", "mIoU"], abs=0.5)
    assert found["llsa,level=1, own probe", "mIoU"] == pytest.approx(found["dense", "mIoU"], abs=0.5)
    assert found["mctf,r=4", "cosine of the map"] < found["llsa,level=1", "cosine of the map"]
    assert found["dense", "pixel accuracy"] > 60
    assert {row.shape for row in rows} == {"4+3x3x64x96"}
    picture = Image.open(out / "segmentation.png")
    assert picture.width > 320 * 7
    assert sorted(path.name for path in out.iterdir()) == ["segmentation.csv", "segmentation.png"]


def test_calibrates_on_training_pictures(run, root):
    """A mixer without thresholds, and a mixer with softmax attention on small maps, stay as they are."""
    given = ("--data-root", root, *SIZE, "--steps", 1, "--calibrate", 2)
    mechanisms = ("--mixer", "anchor,edge=2,dense_up_to=0", "--mixer", "anchor", "--mixer", "hedgehog")
    done = run("probe", "segmentation", MODEL, *given, *mechanisms)
    assert done.exit_code == 0, done.output
    calibrated = [line for line in done.output.splitlines() if "calibrated on" in line]
    assert calibrated == ["anchor,edge=2,dense_up_to=0: calibrated on 2 training pictures"]


def test_a_pyramid(run, root):
    """A convolutional network of timm has maps, too; its last map is small."""
    done = run("probe", "segmentation", "resnet10t", "--data-root", root, "--size", 64, 96, "--steps", 2)
    assert done.exit_code == 0, done.output
    assert "dense" in done.output
    assert "random weights" in done.stderr


def test_names_of_classes(root):
    found = read_labelled(root)
    assert (found.classes, found.palette) == (("class 0", "class 1", "class 2"), None)
    meta = {"classes": ["r", "g", "b", "never"], "palette": COLOURS.tolist(), "ignore_index": 255}
    (root / "classes.json").write_text(json.dumps(meta))
    found = read_labelled(root)
    assert found.classes == ("r", "g", "b", "never")
    assert (found.train.labels[0] == 255).any()
    (root / "classes.json").write_text(json.dumps({"classes": ["r"]}))
    with pytest.raises(InputError, match=r"has class 2, but classes\.json has 1 classes"):
        read_labelled(root)


def break_map(path, how):
    if how == "missing":
        path.unlink()
    elif how == "colours":
        Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(path)
    elif how == "small":
        Image.fromarray(np.zeros((32, 96), np.uint8)).save(path)
    else:
        path.write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "does not exist, and its picture"),
        ("colours", "is not a map of class numbers"),
        ("small", "has 96x32 pixels, but its picture has 96x64"),
        ("damaged", "is damaged or cut short"),
    ],
)
def test_label_maps_that_cannot_be_used(refused, root, tmp_path, how, words):
    break_map(root / "labels" / "val" / "1.png", how)
    out = tmp_path / "out"
    assert words in refused("probe", "segmentation", MODEL, "--data-root", root, *SIZE, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data-root", "nowhere", *SIZE), "nowhere is not a folder"),
        (("--data-root", ".", *SIZE), "--data-root needs images/train"),
        ((*SIZE,), "--data-root"),
        (("--data-root", "colours", "--size", 64, 65), "cannot take 64x65 images"),
        (("--data-root", "colours", *SIZE, "--mixer", "butter"), "butter: mixer must be one of"),
        (("--data-root", "colours", *SIZE, "--reduce", "mctf,window=5"), "mctf,window=5: "),
        (("--data-root", "colours", *SIZE, "--checkpoint", "no.pth"), "no.pth"),
        (("--data-root", "colours", *SIZE, "--out", "colours/images/val/0.jpg"), "cannot be a folder"),
    ],
)
def test_refusals(refused, root, monkeypatch, arguments, words):
    monkeypatch.chdir(root.parent)
    assert words in refused("probe", "segmentation", MODEL, *arguments)


def test_unknown_probe(refused):
    assert "the probes are: binding, field, segmentation" in refused("probe", "colours")


def test_help_names_the_probes(run):
    done = run("probe", "--help")
    assert done.exit_code == 0
    assert "segmentation" in done.output


def fitted(seed=0, steps=60):
    """A probe on maps in which the channel with the largest value is the class, and the maps and labels."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(0, 3, (6, 4, 5), generator=generator)
    maps = Maps(6, (3, 4, 5))
    for index, labels in enumerate(coarse):
        one_hot = torch.nn.functional.one_hot(labels, 3).permute(2, 0, 1)
        maps.write(index, one_hot + 0.1 * torch.randn(3, 4, 5, generator=generator))
    labels = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2).byte()
    labels[:, :2] = 255
    steps_done = []
    recipe = Recipe(steps=steps, batch=4, rate=0.1, seed=seed)
    probe = fit(maps, labels, 3, 255, recipe, torch.device("cpu"), lambda: steps_done.append(1))
    assert len(steps_done) == steps
    return probe, maps, labels


def test_a_probe_learns():
    probe, maps, labels = fitted()
    scores = Scores(3, 255)
    for index, wanted in enumerate(labels):
        scores.add(predict(probe, maps[index], wanted.shape), wanted.long())
    miou, accuracy = scores.percent()
    assert miou > 60
    assert accuracy > 75


def test_the_same_seed_gives_the_same_probe():
    before = torch.random.get_rng_state()
    one, other, third = fitted(steps=5)[0], fitted(steps=5)[0], fitted(seed=1, steps=5)[0]
    assert torch.equal(one.head.weight, other.head.weight)
    assert not torch.equal(one.head.weight, third.head.weight)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_scores():
    """Classes that occur nowhere do not count, nor do ignored pixels."""
    scores = Scores(4, 255)
    scores.add(torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[0, 1, 1, 1, 255]]))
    assert scores.percent() == pytest.approx((100 * (1 / 2 + 2 / 3) / 2, 75))


def test_many_maps_go_to_disk():
    stored, kept = Maps(3, (2, 4, 4), in_memory=10), Maps(3, (2, 4, 4))
    for index in range(3):
        values = torch.randn(2, 4, 4)
        for maps in (stored, kept):
            maps.write(index, values)
    assert torch.equal(stored[torch.tensor([2, 0])], kept[torch.tensor([2, 0])])
    assert kept.file is None
    assert len(stored) == 3
    with pytest.raises(InputError, match="GiB left: take a smaller --size"):
        Maps(10**9, (1000, 100, 100))


def test_maps_that_half_precision_cannot_hold():
    with pytest.raises(InputError, match="not finite"):
        Maps(1, (1, 1, 1)).write(0, torch.full((1, 1, 1), 1e6))


def test_a_single_position_is_refused():
    maps = Maps(1, (2, 1, 1))
    maps.write(0, torch.zeros(2, 1, 1))
    with pytest.raises(InputError, match="take a larger --size"):
        fit(maps, torch.zeros(1, 8, 8).byte(), 2, 255, Recipe(steps=1), torch.device("cpu"), lambda: None)


def test_logits_are_enlarged():
    assert LinearProbe(3, 5)(torch.randn(2, 3, 4, 6), (13, 17)).shape == (2, 5, 13, 17)
