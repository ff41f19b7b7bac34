"""Degradations: MATLAB's bicubic by hand and by its definition; noise, rain and haze by their models; fixed numbers."""

import math

import numpy as np
import pytest
import torch

from terrazzo.degradations import KINDS, Bicubic, GaussianNoise, Haze, Rain, degradation_of
from terrazzo.degradations.bicubic import enlarged, reduced
from terrazzo.degradations.pixels import generator_of, to_image, to_pixels
from terrazzo.errors import InputError


def clean(height=48, width=60, seed=0):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def keys(x):
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def matlab_matrix(length, out, scale):
    """Rows of weights by the definition of MATLAB's imresize: antialiased if smaller, mirrored beyond the border."""
    stretch = min(scale, 1.0)
    matrix = np.zeros((out, length))
    for row in range(out):
        centre = (row + 1) / scale + 0.5 * (1 - 1 / scale)  # counted from 1
        places = range(math.floor(centre - 2 / stretch) - 1, math.ceil(centre + 2 / stretch) + 2)
        weights = np.array([stretch * keys(stretch * (centre - place)) for place in places])
        mirror = [*range(length), *range(length - 1, -1, -1)]
        for place, weight in zip(places, weights / weights.sum()):
            matrix[row, mirror[(place - 1) % (2 * length)]] += weight
    return matrix


def test_half_size_by_hand():
    """An impulse spreads with Keys' weights at 1/4, 3/4, 5/4 and 7/4, halved: exact in binary."""
    impulse = torch.zeros(1, 16, 16, dtype=torch.float64)
    impulse[0, 8, 8] = 1
    # The centres of outputs 2 to 5 are at 4.5, 6.5, 8.5 and 10.5, counted from 0.
    expected = torch.zeros(8, dtype=torch.float64)
    expected[2:6] = torch.tensor([-0.0234375, 0.2265625, 0.8671875, -0.0703125]) / 2
    torch.testing.assert_close(reduced(impulse, 2)[0], torch.outer(expected, expected), atol=1e-12, rtol=0)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [(24, 36), (12, 12)])
def test_bicubic_is_matlabs(scale, size):
    pixels = clean(*size).double()
    down = [matlab_matrix(side, side // scale, 1 / scale) for side in size]
    expected = np.einsum("ij,cjk,lk->cil", down[0], pixels.numpy(), down[1])
    np.testing.assert_allclose(reduced(pixels, scale).numpy(), expected, atol=1e-12)
    up = [matlab_matrix(side, side * scale, scale) for side in size]
    expected = np.einsum("ij,cjk,lk->cil", up[0], pixels.numpy(), up[1])
    np.testing.assert_allclose(enlarged(pixels, scale).numpy(), expected, atol=1e-12)


def test_a_window_with_its_surroundings_is_reduced_as_in_the_whole():
    degrade, pixels = Bicubic(2), clean(64, 64)
    whole = degrade(pixels, generator_of("x"))
    part = degrade(pixels[:, 8:48, 4:44], generator_of("x"))
    edge = degrade.reach // degrade.scale
    torch.testing.assert_close(part[:, edge:-edge, edge:-edge], whole[:, 4 + edge : 24 - edge, 2 + edge : 22 - edge])


def test_noise_has_its_deviation_and_is_not_cut_off():
    noisy = GaussianNoise(25)(torch.ones(3, 128, 128), generator_of("x"))
    assert float((noisy - 1).std()) == pytest.approx(25 / 255, rel=0.02)
    assert float(noisy.max()) > 1
    blind = [GaussianNoise((0, 50))(torch.zeros(3, 64, 64), generator_of(str(n))).std() * 255 for n in range(20)]
    assert min(blind) < 15 < 35 < max(blind) < 51


def test_rain_is_brighter_streaks_along_its_direction():
    degrade = Rain(density=0.005, length=20, angle=0, strength=0.8)
    rainy = degrade(torch.full((3, 96, 96), 0.25), generator_of("x"))
    assert float(rainy.min()) >= 0.25 - 1 / 255
    assert float(rainy.max()) <= 1 - 0.75 * 0.2 + 1 / 255
    assert torch.equal(rainy[0], rainy[2])
    down, across = (float(rainy[0].diff(dim=axis).abs().mean()) for axis in (0, 1))
    assert down < across / 3
    assert 0.02 < float((rainy[0] > 0.4).float().mean()) < 0.5


def test_haze_is_the_scattering_model():
    """Black shows A (1 - t), white shows t + A (1 - t): their difference is t, the same for all colours."""
    degrade = Haze(beta=1.0, airlight=(0.8, 0.8))
    black, white = (degrade(torch.full((3, 40, 50), value), generator_of("x")) for value in (0.0, 1.0))
    transmission = white - black
    assert float(transmission.min()) >= math.exp(-1) - 2 / 255
    torch.testing.assert_close(black, 0.8 * (1 - transmission), atol=2 / 255, rtol=0)
    assert float(transmission[:, :10].mean()) < float(transmission[:, -10:].mean())


@pytest.mark.parametrize(
    "settings",
    [{"type": "Bicubic", "scale": 2}, {"type": "GaussianNoise", "sigma": 25}, {"type": "Rain"}, {"type": "Haze"}],
    ids=str,
)
def test_the_same_name_gives_the_same_picture(settings):
    degrade, pixels = degradation_of(settings), clean()
    one, same, other = (degrade(pixels, generator_of(name)) for name in ("a.png", "a.png", "b.png"))
    assert torch.equal(one, same)
    assert torch.equal(one, other) == (settings["type"] == "Bicubic")
    assert one.shape == (3, 48 // degrade.scale, 60 // degrade.scale)
    assert set(KINDS) == {"Bicubic", "GaussianNoise", "Rain", "Haze"}


def test_pictures_survive_as_pixels():
    image = to_image(clean())
    assert np.array_equal(np.asarray(to_image(to_pixels(image))), np.asarray(image))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"type": "Snow"}, "'Snow' is unknown; choose a type among Bicubic"),
        ({"type": "Bicubic", "scale": 1}, "scale of Bicubic is 1"),
        ({"type": "Bicubic", "scale": 2, "sigma": 3}, "no argument 'sigma'"),
        ({"type": "Bicubic"}, "Bicubic needs the argument 'scale'"),
        ("Haze", "is 'Haze'; it must be a dict"),
        ({"type": ["Haze"]}, "is unknown"),
        ({"type": "GaussianNoise", "sigma": None}, "sigma of GaussianNoise is None"),
        ({"type": "GaussianNoise", "sigma": True}, "sigma of GaussianNoise is True"),
        ({"type": "GaussianNoise", "sigma": math.inf}, "sigma of GaussianNoise is inf"),
        ({"type": "GaussianNoise", "sigma": -1}, "sigma of GaussianNoise is -1"),
        ({"type": "GaussianNoise", "sigma": (9, 3)}, "two rising numbers"),
        ({"type": "Rain", "strength": 2}, "0 to 1"),
        ({"type": "Haze", "airlight": "white"}, "airlight of Haze is 'white'"),
    ],
)
def test_refused_settings(settings, words):
    with pytest.raises(InputError, match=words):
        degradation_of(settings)


def test_sides_must_be_multiples_of_the_scale():
    with pytest.raises(InputError, match="multiples of the scale 2"):
        reduced(clean(15, 16), 2)


def test_numbers_for_any_name_of_a_file():
    """Names that are not UTF-8 have surrogates in Python."""
    first, again, other = (generator_of(name).initial_seed() for name in ("caf\udce9.png", "caf\udce9.png", "café.png"))
    assert first == again != other
