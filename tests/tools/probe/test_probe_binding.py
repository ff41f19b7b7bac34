"""`terrazzo probe binding`: do two positions belong to one object?"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.data.instances import read_instances
from terrazzo.tools.probe.objects.ablation import Subspace, changed_block, inject, random_like, shuffle, zero
from terrazzo.tools.probe.objects.cells import UNUSED, cells, filled_up, on_grid, sample
from terrazzo.tools.probe.objects.collect import Cells, Sampling, of_pixels, of_place
from terrazzo.tools.probe.objects.outcomes import outcomes_of, table
from terrazzo.tools.probe.objects.readouts import READOUTS, Linear, LowRank, Quadratic, Training, fit
from terrazzo.tools.probe.objects.scores import AUC, INSIDE, PRIOR, SHARE, scores

COLOURS = np.array([(30, 30, 30), (200, 30, 30), (30, 200, 30), (30, 30, 200)], np.uint8)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures of four rectangles in COCO's format; two categories, so that one category has two objects."""
    folder = tmp_path_factory.mktemp("data") / "rectangles"
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        images, marks = [], []
        (folder / "images" / split).mkdir(parents=True)
        for index in range(1, count + 1):
            pixels = np.zeros((70, 100), np.int64)
            for corner in range(4):
                top, left = (
                    35 * (corner // 2) + int(random.integers(1, 4)),
                    50 * (corner % 2) + int(random.integers(1, 4)),
                )
                bottom, right = top + int(random.integers(24, 30)), left + int(random.integers(34, 44))
                pixels[top:bottom, left:right] = corner % 3 + 1
                box = [left, top, right, top, right, bottom, left, bottom]
                marks.append(
                    dict(
                        id=len(marks) + 1,
                        image_id=index,
                        category_id=7 + corner % 2,
                        segmentation=[box],
                        area=(bottom - top) * (right - left),
                        bbox=[left, top, right - left, bottom - top],
                        iscrowd=0,
                    )
                )
            Image.fromarray(COLOURS[pixels]).save(folder / "images" / split / f"{index}.png")
            images.append(dict(id=index, file_name=f"{index}.png", height=70, width=100))
        images.append(dict(id=99, file_name="missing.png", height=70, width=100))  # without an instance
        (folder / "annotations").mkdir(exist_ok=True)
        facts = dict(images=images, annotations=marks, categories=[dict(id=7, name="a"), dict(id=8, name="b")])
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(facts))
    return folder


def sets(count, code, rotation=None, seed=0):
    """Positions of five objects; an object's code in eight of 64 channels, and large numbers in the others."""
    generator = torch.Generator().manual_seed(seed)
    objects = torch.randint(1, 6, (count, 48), generator=generator)
    codes = torch.randn(count, 6, 8, generator=generator)
    own = codes[torch.arange(count)[:, None], objects] + code * torch.randn(count, 48, 8, generator=generator)
    features = torch.cat([own, 3 * torch.randn(count, 48, 56, generator=generator)], dim=2)
    if rotation is not None:
        features = features @ rotation
    return filled_up(list(features), list(objects), list(objects), list(torch.zeros(count, 48, 2)))


def test_readouts_are_symmetric():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12)
    for name, make in READOUTS.items():
        found = make(12)(x)
        assert found.shape == (2, 5, 5), name
        torch.testing.assert_close(found, found.mT)


def test_hand_case():
    quad, linear = Quadratic(2), Linear(2)
    with torch.no_grad():
        quad.weight.weight.copy_(torch.tensor([[1.0, 4.0], [0.0, 3.0]]))
        quad.bias.fill_(0.5)
        linear.weight.weight.copy_(torch.tensor([[2.0, -1.0]]))
        linear.weight.bias.fill_(0.25)
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    matrix = torch.tensor([[2.0, 4.0], [4.0, 6.0]]) / (2 * 2**0.5)
    torch.testing.assert_close(quad(x), (matrix + 0.5)[None])
    torch.testing.assert_close(linear(x), torch.tensor([[[4.25, 1.25], [1.25, -1.75]]]))


def test_the_low_rank_form_with_eigenvectors_is_the_quadratic_form():
    torch.manual_seed(0)
    quad, low = Quadratic(6), LowRank(6, 6)
    values, vectors = torch.linalg.eigh(quad.matrix().detach())
    with torch.no_grad():
        low.project.weight.copy_(vectors.T)
        low.signs.copy_(values)
    x = torch.randn(3, 4, 6)
    torch.testing.assert_close(low(x), quad(x))


@pytest.mark.long
def test_objects_in_some_channels():
    """Every quadratic form finds the code; a rotation hides it from the diagonal form; the linear form sees nothing."""
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))[0]
    found = {}
    for turned in (None, rotation):
        train, val = sets(160, 0.3, turned), sets(24, 0.3, turned, seed=1)
        for name in ("quad", "diag", "linear"):
            readout = fit(name, train.standardised(train), Training(steps=200, rate=3e-3))
            found[name, turned is not None] = scores(readout, val.standardised(train))[AUC]
    assert found["diag", False] > 90
    assert found["quad", False] > 80
    assert found["diag", True] < found["diag", False] - 30
    assert abs(found["quad", True] - found["quad", False]) < 6
    assert all(45 < found["linear", turned] < 55 for turned in (False, True))


@pytest.mark.long
def test_shuffled_labels_teach_nothing():
    """No way leads from the labels to the scores but the features."""
    generator = torch.Generator().manual_seed(0)
    train, val = (
        dataclasses.replace(data, objects=data.objects[:, torch.randperm(48, generator=generator)])
        for data in (sets(80, 0.3), sets(40, 0.3, seed=1))
    )
    for name in READOUTS:
        readout = fit(name, train.standardised(train), Training(steps=60))
        assert scores(readout, val.standardised(train))[AUC] == pytest.approx(50, abs=2), name


def test_scores_by_hand():
    """Two pictures, the second filled up; the readout is the product of the features."""
    data = filled_up(
        [torch.tensor([[1.0], [2.0], [-1.0]]), torch.tensor([[1.0], [1.0]])],
        [torch.tensor([1, 1, 2]), torch.tensor([1, 2])],
        [torch.tensor([7, 7, 7]), torch.tensor([7, 8])],
        [torch.tensor([[0, 0], [0, 1], [0, 3]]), torch.tensor([[0, 0], [0, 9]])],
    )

    class Product(torch.nn.Module):
        def forward(self, x):
            return x @ x.mT

    found = scores(Product(), data)
    # Pairs: (1, 2) one object 2; (1, 3) two -1; (2, 3) two -2; (1, 2) of the second picture two 1.
    assert found[SHARE] == pytest.approx(25)
    assert found[PRIOR] == pytest.approx(75)
    assert found["accuracy"] == pytest.approx(75)
    assert found["balanced accuracy"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert found[AUC] == found[INSIDE] == pytest.approx(100)
    assert "AUC beyond 8 cells" not in found


def test_cells_need_a_majority():
    numbers = np.array([[1, 1, 2, 2], [1, 1, 2, 3], [0, 3, 3, 3], [1, 2, 3, 3]])
    assert cells(numbers, (2, 2)).tolist() == [[1, 2], [UNUSED, 3]]
    assert cells(numbers, (4, 4)).tolist() == numbers.tolist()
    # Cells of a grid that does not divide the picture
    assert cells(np.arange(5)[None].repeat(5, 0) // 3, (2, 2)).tolist() == [[0, 1], [0, 1]]


def test_sampled_cells():
    labels = np.array([[0, 1, UNUSED], [2, 2, 0]])
    assert sorted(sample(labels, False, 9, 0)) == [1, 3, 4]
    assert sorted(sample(labels, True, 9, 0)) == [0, 1, 3, 4, 5]
    assert len(sample(labels, True, 2, 0)) == 2
    assert sample(labels, True, 3, 5).tolist() == sample(labels, True, 3, 5).tolist()


def test_other_grids():
    fine = torch.arange(16.0).view(1, 1, 4, 4)
    assert on_grid(fine, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert on_grid(on_grid(fine, (2, 2)), (4, 4))[0, 0, 0].tolist() == [2.5, 2.5, 4.5, 4.5]
    assert on_grid(fine, (4, 4)) is fine


def test_instances_and_controls(root):
    split = read_instances(root, "train")
    assert len(split.pictures) == 6
    assert split.categories == {7: "a", 8: "b"}
    numbers, categories = split.instances(0, (70, 100))
    assert set(np.unique(numbers)) == {0, 1, 2, 3, 4}
    assert sorted(categories[1:]) == [7, 7, 8, 8]
    data = Cells(split, dict(mean=(0, 0, 0), std=(1, 1, 1)), Sampling((64, 64), 12))
    place, pixels = of_place(data, (8, 8)), of_pixels(data, (8, 8))
    assert place.features.shape == (6, 12, 18)
    assert pixels.features.shape == (6, 12, 192)
    assert torch.equal(place.objects, pixels.objects)
    # A cell of one colour has its colour everywhere: the first value of each channel is nearly the last.
    taken = data.cells(0, (8, 8))[0]
    assert [8 * int(r) + int(c) for r, c in place.places[0]] == taken.tolist()
    position = place.features[0, 0, :2]
    torch.testing.assert_close(position, (place.places[0, 0] + 0.5) / 8)
    with pytest.raises(InputError, match="70x100"):
        split.instances(0, (100, 70))


def test_annotations_that_lack_something(root, tmp_path):
    """Areas are found by the masks; nothing else may be missing."""
    facts = json.loads((root / "annotations" / "instances_train.json").read_text())
    shutil.copytree(root / "images", tmp_path / "images")
    (tmp_path / "annotations").mkdir()
    wanted = read_instances(root, "train").instances(0, (70, 100))
    for kind, key, words in (
        ("annotations", "area", None),
        ("images", "height", "picture 1 lacks 'height'"),
        ("annotations", "category_id", "lacks 'category_id'"),
    ):
        without = [{name: value for name, value in fact.items() if name != key} for fact in facts[kind]]
        (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps({**facts, kind: without}))
        if words is None:
            found = read_instances(tmp_path, "train").instances(0, (70, 100))
            assert len(np.unique(found[0])) == len(np.unique(wanted[0]))
            assert ((found[0] > 0) == (wanted[0] > 0)).all()
        else:
            with pytest.raises(InputError, match=words):
                read_instances(tmp_path, "train")


def test_ablations_that_change_nothing():
    torch.manual_seed(0)
    tokens = torch.randn(20, 8)
    objects = torch.randint(0, 3, (20,))
    subspace = Subspace(torch.randn(3, 8), tokens.mean(0))
    assert torch.equal(shuffle(0.0)(tokens, subspace), tokens)
    assert torch.equal(inject(objects, 1.0)(tokens, subspace), tokens)
    flat = torch.cat([torch.randn(20, 5), torch.zeros(20, 3)], dim=1)
    aside = Subspace(torch.eye(8)[5:], flat.mean(0))
    torch.testing.assert_close(zero(flat, aside), flat, atol=1e-6, rtol=0)


def test_ablations():
    torch.manual_seed(0)
    tokens, objects = torch.randn(20, 8), torch.randint(0, 3, (20,))
    subspace = Subspace(torch.randn(3, 8), tokens.mean(0))
    rest = tokens - subspace.part(tokens)
    for change in (shuffle(1.0), shuffle(0.5), inject(objects, 0.0), inject(objects, 0.5), zero):
        found = change(tokens, subspace)
        assert not torch.allclose(found, tokens)
        torch.testing.assert_close(found - subspace.part(found), rest)  # nothing else changes
    assert torch.allclose(subspace.part(zero(tokens, subspace)), torch.zeros(20, 8), atol=1e-5)
    injected = subspace.part(inject(objects, 0.0)(tokens, subspace))
    for number in range(3):
        inside = injected[objects == number]
        torch.testing.assert_close(inside, inside.mean(0).expand_as(inside))
    shuffled = subspace.part(shuffle(1.0)(tokens, subspace))
    torch.testing.assert_close(shuffled.sum(0), subspace.part(tokens).sum(0))
    stretched = tokens * torch.linspace(0.2, 5, 8)
    wanted = Subspace(torch.eye(8)[6:], stretched.mean(0))
    random = random_like(wanted, stretched)
    assert random.energy(stretched) == pytest.approx(wanted.energy(stretched), abs=0.1)


def test_a_block_is_changed_behind_its_front():
    block = torch.nn.Identity()
    x = torch.randn(2, 5, 4)
    with changed_block(block, 1, Subspace(torch.eye(4), torch.zeros(4)), zero):
        found = block(x)
    assert torch.equal(found[:, 0], x[:, 0])
    torch.testing.assert_close(found[:, 1:], torch.zeros(2, 4, 4))
    assert torch.equal(block(x), x)


@pytest.mark.long
def test_rows_curves_and_pictures(run, root, tmp_path):
    out = tmp_path / "out"
    given = ("--data-root", root, "--size", 64, 96, "--steps", 5, "--positions", 16, "--out", out)
    done = run(
        "probe",
        "binding",
        "test_vit",
        *given,
        "--reduce",
        "mctf,r=4",
        "--readout",
        "quad-16",
        "--level",
        5,
        "--ablate",
        2,
    )
    assert done.exit_code == 0, done.output
    rows = results.read(out / "binding.csv")
    assert {row.backend for row in rows} == {
        f"{name}, 4x6, quad-16, seed 0" for name in ("position alone", "pixels", "dense, level 5", "mctf,r=4, level 5")
    }
    assert all(0 <= row.p50 <= 100 for row in rows)
    again = outcomes_of(rows)
    assert [(x.form, x.level, x.grid) for x in again][1:] == [
        ("pixels", None, (4, 6)),
        ("dense", 5, (4, 6)),
        ("mctf,r=4", 5, (4, 6)),
    ]
    assert all(line[0] in done.output and line[-1] in done.output for line in table(again)[1])
    assert "block 2" in done.output
    assert "inject, alpha 0.5" in done.output
    assert sorted(path.name for path in out.iterdir()) == ["binding.csv", "binding.png", "objects.png"]
    assert Image.open(out / "objects.png").width > 640


@pytest.mark.long
def test_a_pyramid_and_random_weights(run, root, tmp_path):
    """Stages have their own grids and a common one; a model with weights is compared with itself without."""
    import timm

    weights = tmp_path / "mine.pth"
    torch.save(timm.create_model("resnet10t").state_dict(), weights)
    given = ("--data-root", root, "--size", 64, 64, "--steps", 3, "--pairs", "all", "--count", 3)
    done = run("probe", "binding", "resnet10t", "--checkpoint", weights, *given)
    assert done.exit_code == 0, done.output
    for grid in ("32x32", "16x16", "8x8", "4x4"):
        assert f"  {grid}  " in done.output
    assert "not run: 2x2: the cells have no pairs of both kinds" in done.output
    assert "random weights" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data-root", "nowhere"), "instances_train.json does not exist"),
        (("--data-root", "ROOT", "--level", 9), "--level 9: the levels are 0 to 5"),
        (("--data-root", "ROOT", "--ablate", 9), "--ablate 9: the blocks are 0 to 5"),
        (("--data-root", "ROOT", "--size", 65, 64), "65x64"),
    ],
)
def test_refusals(refused, root, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    given = [root if value == "ROOT" else value for value in arguments]
    size = () if "--size" in given else ("--size", 64, 96)
    assert words in refused("probe", "binding", "test_vit", *given, *size, "--out", "out")
    assert not list(tmp_path.iterdir())


def test_only_plain_vits_are_ablated(refused, root):
    words = refused("probe", "binding", "resnet10t", "--data-root", root, "--size", 64, 64, "--ablate", 1)
    assert "tokens of a plain ViT" in words
