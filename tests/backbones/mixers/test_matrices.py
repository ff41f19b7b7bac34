"""Matrices of mixers: a matrix times values is what the mixer computes, in float64."""

import pytest
import torch
from support.mixer_contract import place_of

from terrazzo.backbones.mixers import Host, create_mixer
from terrazzo.errors import InputError

OPEN = 1.2784645427610737  # where silu is 1
CASES = [
    ("hedgehog", {}),
    ("ssd", {}),
    ("ssd", dict(review=True)),
    ("mate", dict(window=4)),
    ("linear_infsa", {}),
    ("retention", {}),
    ("retention", dict(dims=1, directions=1)),
    ("dydila", {}),
    ("dydila", dict(norm="abs")),
    ("dydila", dict(norm="none")),
    ("na", dict(kernel=3)),
    ("na", dict(kernel=3, dilation=2, bias=True)),
    ("na", dict(kernel=20)),
    ("lsa", dict(split=(2, 4))),
    ("lsa", dict(split=(2, 4), shifted=True, masked=False)),
    ("axial", {}),
]


def lively(mixer):
    """Random parameters; what acts on values alone stays the identity, or is zero where it is added."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if "z_proj" in name:
                if name.endswith("bias"):
                    parameter.fill_(OPEN)
                continue
            if "dwc" in name or "get_v" in name:
                parameter.zero_()
                continue
            noise = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if "conv" in name:  # values come first
                noise[: len(noise) // 3] = 0
            parameter.add_(noise)
    return mixer


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("name", "options"), CASES)
@torch.no_grad()
def test_matrix_times_values(name, options, layer):
    for grid, prefix in (((7, 11), 1), ((6, 4), 0)):
        torch.manual_seed(0)
        mixer = lively(create_mixer(name, Host(32, 4, 8, layer, 4), dtype=torch.float64, **options))
        count = prefix + grid[0] * grid[1]
        q, k, v = torch.randn(3, 2, 4, count, 8, dtype=torch.float64)
        place = place_of(grid, prefix, torch.randn(2, count, 32, dtype=torch.float64), k)
        matrix = mixer.matrix(q, k, v, place)
        assert matrix.shape == (2, 4, count, count)
        torch.testing.assert_close(matrix @ v, mixer(q, k, v, place), rtol=0, atol=1e-10)
        if name in ("hedgehog", "na"):
            torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 4, count, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["hedgehog", "ssd", "mate", "linear_infsa", "retention", "dydila", "na"])
def test_gradients_of_matrices(name):
    """Gradients reach queries and keys, also in half precision under autocast."""
    mixer = lively(create_mixer(name, Host(32, 4, 8, 1, 4)))
    q, k, v = torch.randn(3, 2, 4, 50, 8).unbind()
    q.requires_grad_()
    place = place_of((7, 7), 1, torch.randn(2, 50, 32), k)
    with torch.autocast("cpu", torch.bfloat16):
        matrix = mixer.matrix(q.bfloat16(), k.bfloat16(), v.bfloat16(), place)
    assert matrix.dtype == torch.float32
    matrix.square().sum().backward()
    assert torch.isfinite(q.grad).all()
    assert q.grad.abs().sum() > 0


def test_a_mixer_without_a_matrix():
    mixer = create_mixer("llsa", Host(32, 4, 8), dense_up_to=1)
    q, k, v = torch.randn(3, 1, 4, 64, 8)
    with pytest.raises(InputError, match="mixer 'llsa' has no matrix of weights: train the stage 'hidden'"):
        mixer.matrix(q, k, v, place_of((8, 8), 0, torch.randn(1, 64, 32), k))
