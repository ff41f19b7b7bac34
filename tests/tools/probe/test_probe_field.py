"""`terrazzo probe field`: the energy of a position's gradient, by pixel, and the discs that hold it."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.probe.field import radii_of
from terrazzo.tools.probe.receptive import Field, receptive_field


class Maps(nn.Module):
    """A model whose only map is that of a layer."""

    pretrained_cfg = {}

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward_intermediates(self, x, indices, norm, intermediates_only):
        return [[self.layer(x)][index] for index in indices]


def images(height, width):
    return [torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))]


def test_a_convolution_depends_on_its_window_alone():
    field = receptive_field(Maps(nn.Conv2d(3, 4, (3, 5), padding=(1, 2))), images(17, 21))
    assert field.energy.sum() == pytest.approx(1)
    rows, columns = field.energy.nonzero()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (7, 9, 8, 12)
    assert field.stride == 1
    assert all(radius < 3.5 for radius in field.radii().values())


@pytest.mark.long
def test_energy_is_the_squared_norm_of_the_jacobian():
    """The mean over signs of the squared gradient; a linear layer has the same gradient for every image."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3, padding=1, bias=False).double()
    many = [torch.zeros(1, 3, 5, 5, dtype=torch.float64)] * 4000
    found = receptive_field(Maps(layer), many).energy[1:4, 1:4]
    wanted = layer.weight.detach().square().sum((0, 1)).numpy()
    assert np.allclose(found, wanted / wanted.sum(), rtol=0.1)


def test_radii_of_a_disc():
    """Uniform energy in a disc of radius 40: half of it is within 40 / sqrt(2)."""
    rows, columns = np.mgrid[:101, :121]
    disc = ((rows - 50) ** 2 + (columns - 40) ** 2 <= 40**2).astype(float)
    field = Field(disc / disc.sum(), 1.0)
    assert field.middle == pytest.approx((50.5, 40.5), abs=0.1)
    radii = field.radii((0.5, 0.9, 1.0))
    assert radii[0.5] == pytest.approx(40 / 2**0.5, abs=0.5)
    assert radii[0.9] == pytest.approx(40 * 0.9**0.5, abs=0.5)
    assert radii[1.0] == pytest.approx(40, abs=0.5)


def test_a_shifted_grid_has_its_middle_where_its_energy_is():
    """A padded convolution with stride looks around the corner of its cell, and not around the middle."""
    field = receptive_field(Maps(nn.Conv2d(3, 4, 3, stride=2, padding=1)), images(16, 16))
    assert field.stride == 2
    assert field.middle == pytest.approx((8.5, 8.5), abs=0.7)
    assert max(field.radii().values()) < 2.2


@pytest.mark.parametrize(
    ("layer", "level", "words"),
    [
        (nn.Conv2d(3, 4, 3), 3, r"cannot take 16x16 images for the maps \[3\]"),
        (nn.Conv2d(3, 4, 17), -1, r"cannot take 16x16 images for the maps \[-1\]"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Threshold(1e9, 0.0)), -1, "zero or not finite"),
    ],
)
def test_what_has_no_field(layer, level, words):
    with pytest.raises(InputError, match=words):
        receptive_field(Maps(layer), images(16, 16), level)


def test_rows_and_page(run, tmp_path):
    out = tmp_path / "out"
    given = ("--size", 64, 64, "--count", 1, "--device", "cpu", "--out", out)
    done = run("probe", "field", "resnet10t", "test_vit", *given, "--level", 1)
    assert done.exit_code == 0, done.output
    found = radii_of(results.read(out / "field.csv"))
    assert list(found) == ["resnet10t", "test_vit"]
    for radii in found.values():
        assert 0 < radii[0.5] <= radii[0.9] <= radii[0.99] < 46
    assert Image.open(out / "field.png").width > 2 * 320


def test_random_and_given_weights_are_told_apart(run, tmp_path):
    import timm
    from safetensors.torch import save_file

    weights = tmp_path / "mine.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), weights)
    done = run("probe", "field", "test_vit", "--checkpoint", weights, "--size", 64, 64, "--count", 1)
    assert done.exit_code == 0, done.output
    assert "test_vit, random weights" in done.output
    assert "test_vit, mine.safetensors" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("butter",), "butter"),
        (("resnet10t", "test_vit", "--pretrained"), "weights are for one MODEL"),
        (("test_vit", "--level", 99, "--size", 64, 64), "for the maps [99]"),
        (("test_vit", "--pictures", "nowhere"), "nowhere"),
        (("test_vit", "resnet10t", "--level", 99, "--size", 64, 64), "resnet10t: "),
    ],
)
def test_refusals(refused, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused("probe", "field", *arguments, "--out", "out")
    assert not list(tmp_path.iterdir())


def test_a_model_without_field_is_named(run):
    done = run("probe", "field", "resnet10t", "test_vit", "--level", 5, "--size", 64, 64, "--count", 1)
    assert done.exit_code == 0, done.output
    assert "not run: resnet10t: resnet10t cannot take 64x64 images for the maps [5]" in done.output
