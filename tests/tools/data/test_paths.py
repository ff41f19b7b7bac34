"""Path images: what is promised of contours, discs, labels and numbers."""

import dataclasses
import math

import numpy as np
import pytest

from terrazzo.errors import InputError
from terrazzo.tools.data.paths import DENSE_SIZES, SIZES, growth, paths, segments
from terrazzo.tools.data.paths.image import make
from terrazzo.tools.data.paths.recipe import dense_recipes, recipes

COUNT = 10


@pytest.fixture(scope="module")
def made():
    """Images of three kinds: published ones, and the dense form."""
    return {
        "32": list(paths(32, COUNT)),
        "128": list(paths(128, 4)),
        "dense": list(paths(128, 3, dense=True)),
    }


def same(one, other):
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name))
        for field in dataclasses.fields(one)
        if field.name != "recipe"
    )


def distances(image, first, second):
    """Between the paddles of two contours, by points along both, so that no formula of the generator is used."""
    steps = np.linspace(0, 1, 21)[:, None, None]
    one, two = (
        (image.paddles[:2, image.owners == number] * (1 - steps) + image.paddles[2:, image.owners == number] * steps)
        .transpose(0, 2, 1)
        .reshape(-1, 2)
        for number in (first, second)
    )
    return np.hypot(*(one[:, None] - two[None]).transpose(2, 0, 1))


def test_segments_against_points_along_them():
    random = np.random.default_rng(0)
    first, second = random.uniform(0, 20, (2, 4, 100))
    along = np.linspace(0, 1, 101)
    points = [line[:2, :, None] * (1 - along) + line[2:, :, None] * along for line in (first, second)]
    brute = np.hypot(*(points[0][..., :, None] - points[1][..., None, :])).min((1, 2))
    found = np.sqrt(segments.between(first, second))
    assert (found >= brute - 0.2).all()
    apart = brute > 0.4  # the others cross
    assert apart.sum() > 60
    assert np.abs(found - brute)[apart].max() < 0.2
    length = np.hypot(*(first[2:] - first[:2]))
    assert (found[~apart] <= length[~apart] / 2 + 0.4).all()


def test_turns_have_the_published_density():
    """The mean of |turn| under cos(c * turn)² is (pi/4 - 1/pi) / c, from the integral."""
    for continuity in (1.0, 1.8):
        found = growth.turns(np.random.default_rng(0), continuity, 100_000)
        assert np.abs(found).max() <= math.pi / 2 / continuity
        assert np.abs(found).mean() == pytest.approx((math.pi / 4 - 1 / math.pi) / continuity, rel=0.02)
        assert found.mean() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("kind", ["32", "128", "dense"])
def test_contours(made, kind):
    """Every long contour is whole, and no two masks of different contours meet."""
    for image in made[kind]:
        recipe = image.recipe
        for number in (1, 2):
            own = image.paddles[:, image.owners == number]
            assert own.shape == (4, recipe.contour)
            assert np.hypot(*(own[2:] - own[:2])) == pytest.approx(recipe.length)
            angles = np.arctan2(own[3] - own[1], own[2] - own[0])
            turned = np.abs((np.diff(angles) + math.pi) % (2 * math.pi) - math.pi)
            assert turned.max() <= recipe.turn + 1e-9
            assert np.hypot(*(own[:2, 1:] - own[2:, :-1])).max() <= 2 * recipe.margin + 1e-9
        for first in range(1, image.owners.max() + 1):
            for second in range(first + 1, image.owners.max() + 1):
                assert distances(image, first, second).min() >= recipe.thickness + 2 * recipe.margin - 1e-9
        assert image.paddles.min() >= recipe.padding
        assert image.paddles.max() <= recipe.size - 1 - recipe.padding


@pytest.mark.parametrize("kind", ["32", "128", "dense"])
def test_discs(made, kind):
    for image in made[kind]:
        tips = [image.paddles[:, image.owners == number][:2, 0] for number in (1, 2)]
        assert np.hypot(*(tips[0] - tips[1])) == pytest.approx(image.recipe.seed_distance)
        assert np.array_equal(image.discs[0], tips[image.marked - 1])
        last = image.marked if image.label else 3 - image.marked
        assert np.array_equal(image.discs[1], image.paddles[:, image.owners == last][2:, -1])
        for x, y in np.round(image.discs).astype(int):
            assert image.image[y, x] == 255


def test_labels(made):
    assert {image.label for image in made["32"]} == {0, 1}
    assert {image.marked for image in made["32"]} == {1, 2}
    assert {image.recipe.margin for image in made["128"]} == {2, 3}
    assert all(image.label == 1 for image in made["dense"])
    # Labels are drawn before anything else.
    labels = [
        np.random.Generator(np.random.Philox(key=[0, 0], counter=[0, 0, 0, i])).integers([1, 2])[1] for i in (0, 1)
    ]
    assert [image.label for image in made["32"][:2]] == labels


def test_pixels(made):
    for image in made["dense"]:
        assert image.image.dtype == np.uint8
        assert image.instances.max() == image.owners.max()
        assert np.array_equal(image.classes == 1, image.path)
        assert np.array_equal(image.classes > 0, image.instances > 0)
        # A pixel inside is at least half as bright as a whole one, except that discs are drawn over it.
        assert image.image[image.instances > 0].min() >= 255 * image.recipe.contrast / 2 - 1
        area = image.recipe.contour * image.recipe.length * image.recipe.thickness
        assert image.path.sum() == pytest.approx(area, rel=0.4)


def test_the_dilated_path_is_one_piece_and_solves_the_dense_task(made):
    """Flood fill over dilated paddles from one disc: the oracle of the dense form."""
    ndimage = pytest.importorskip("scipy.ndimage", reason="needs the extra 'openmmlab', which brings SciPy")
    fine = 4
    for image in made["dense"]:
        # Masks of neighbours overlap by the thickness, and masks of others touch at most.
        away = np.ones([fine * image.recipe.size] * 2, bool)
        for step in np.linspace(0, 1, 41):
            columns, rows = np.round(fine * (image.paddles[:2] * (1 - step) + image.paddles[2:] * step)).astype(int)
            away[rows, columns] = False
        reach = image.recipe.margin + 0.5 * image.recipe.thickness - 0.4
        pieces, _ = ndimage.label(ndimage.distance_transform_edt(away) <= fine * reach)
        pieces = pieces[::fine, ::fine]
        assert len(np.unique(pieces[image.path])) == 1
        x, y = np.round(image.discs[0]).astype(int)
        found = (pieces == pieces[y, x]) & (image.classes > 0)
        assert (found & image.path).sum() >= 0.95 * (found | image.path).sum()


@pytest.mark.long
def test_an_image_depends_on_its_number_alone(made):
    """Neither how many images are made, nor by how many processes, changes one of them."""
    assert all(map(same, paths(32, 3), made["32"]))
    assert all(map(same, paths(32, COUNT, workers=2), made["32"]))
    assert not same(next(paths(32, 1, seed=1)), made["32"][0])
    assert not same(next(paths(32, 1, split=1)), made["32"][0])


def test_sizes():
    for size in SIZES:
        assert {recipe.size for recipe in recipes(size)} == {size}
    assert [dense_recipes(size)[0].contour for size in DENSE_SIZES] == [14, 14, 28, 56, 112]
    assert recipes(32, 6)[0].contour == 6


def test_single_paddles_fill_free_places():
    filled = make(recipes(32, 6, single_paddles=True), 0, 0)
    plain = make(recipes(32, 6), 0, 0)
    assert np.array_equal(filled.paddles[:, : plain.paddles.shape[1]], plain.paddles)
    added = filled.owners.max() - plain.owners.max()
    assert added > 0
    assert (np.bincount(filled.owners)[-added:] == 1).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((48, 1), "have 32, 64, 128, 256 pixels a side, got 48"),
        ((32, -1), "n must be at least 0"),
        ((32, 1, 1), "a contour of 1 paddles"),
        ((32, 1, 14, -1), "seed must be at least 0"),
        ((32, 1, 60), "two contours of 60 paddles do not fit into 32 pixels"),
    ],
)
def test_refusals(arguments, words, monkeypatch):
    monkeypatch.setattr("terrazzo.tools.data.paths.image._RESTARTS", 1)
    with pytest.raises(InputError, match=words):
        list(paths(*arguments))
    with pytest.raises(InputError, match="no single paddles"):
        list(paths(128, 1, dense=True, single_paddles=True))
