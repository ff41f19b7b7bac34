"""Counts equal sums by hand."""

import pytest
import timm
import torch
from torch import nn

from terrazzo.errors import InputError
from terrazzo.tools.inspect.measure import measure


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).transpose(1, 2)[:, None]  # 1 1 HW C
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_equals_the_sum_by_hand(device):
    measured = measure(Tiny().to(device), (9, 12))
    outputs = 5 * 6 * 8  # ceil(9 / 2) x ceil(12 / 2) x channels
    assert measured.params == (3 * 8 * 9 + 8) + (8 + 8) + 8 * 5
    assert measured.macs == outputs * 3 * 9 + 8 * 5
    assert measured.activations == outputs + 5


def test_attention_is_two_products():
    measured = measure(Attention(), (4, 5), in_chans=6)
    assert measured.macs == 2 * 20 * 20 * 6
    assert measured.activations == 20 * 20 + 20 * 6


def test_agrees_with_published_resnet18():
    measured = measure(timm.create_model("resnet18"), 224)
    assert measured.params == 11_689_512
    assert measured.macs == pytest.approx(1.82e9, rel=0.01)
    assert measured.activations == pytest.approx(2.48e6, rel=0.01)


def test_neighborhood_attention_counts():
    """DiNAT-Mini's published 2.7 GMACs include its attention's products."""
    with torch.device("meta"):
        model = timm.create_model("dinat_mini")
    measured = measure(model, 224)
    assert measured.params == pytest.approx(20e6, rel=0.02)
    assert measured.macs == pytest.approx(2.7e9, rel=0.03)


def test_leaves_the_model_as_it_was():
    model = Tiny()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure(model, 16)
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("size", [0, (0, 4), (4, -1)])
def test_refuses_impossible_sizes(size):
    with pytest.raises(InputError, match="at least 1"):
        measure(Tiny(), size)
