"""Trajectory attention against the official code's packs, and its properties."""

import pytest
import torch
from support.mixer_contract import MixerPack, packs

from terrazzo.clips import TrajectoryAttention
from terrazzo.clips import trajectory as module
from terrazzo.errors import InputError

PACKS = [name for name in packs("axial_trajectory") if name.startswith("ta_")]


def attention(dim=16, heads=4, **options):
    torch.manual_seed(0)
    return TrajectoryAttention(dim, heads, dtype=torch.float64, **options).eval()


@pytest.fixture(params=["unprojected tracks", "projected tracks"])
def form(request, monkeypatch):
    """Both forms of the attention along tracks."""
    monkeypatch.setattr(module, "is_bare", lambda *layers: request.param == "unprojected tracks")


@pytest.mark.parametrize("name", PACKS)
def test_golden(name, form):
    """Outputs and all gradients. With one frame, gradients of the second attention's queries and keys are 0."""
    pack = MixerPack("axial_trajectory", name)
    layer = attention(16, pack.meta["heads"])
    layer.load_state_dict({key.removeprefix("w."): pack[key] for key in pack.arrays if key.startswith("w.")})
    x = pack["x"].requires_grad_()
    value = pack["value"].requires_grad_() if "value" in pack.arrays else None
    out = layer(x, x, value, frames=pack.meta["frames"])
    torch.testing.assert_close(out, pack["out"], rtol=0, atol=1e-9)
    (out * pack["grad"]).sum().backward()
    torch.testing.assert_close(x.grad, pack["dx"], rtol=0, atol=1e-9)
    if value is not None:
        torch.testing.assert_close(value.grad, pack["dvalue"], rtol=0, atol=1e-9)
    for key, parameter in layer.named_parameters():
        wanted = pack[f"dw.{key}"]  # matrices are rounded to float32
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-6, atol=1e-12 + 1e-6 * wanted.abs().max().item())


def test_packs_are_there():
    assert len(PACKS) == 3


def test_parameters():
    with torch.device("meta"):
        separate, joined = TrajectoryAttention(256), TrajectoryAttention(256, joined=True)
    assert sum(p.numel() for p in separate.parameters()) == 460_544
    assert sum(p.numel() for p in joined.parameters()) == 460_544


@torch.no_grad()
def test_one_frame_is_attention_and_two_linear_layers():
    layer = attention()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    q, k, v = (part(x).unflatten(-1, (4, 4)).transpose(1, 2) for part in (layer.q, layer.k, layer.v))
    plain = ((q @ k.transpose(2, 3) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.proj(layer.proj_kv(plain)[..., 16:]))


@torch.no_grad()
def test_joined_projections_are_the_separate_ones():
    separate, joined = attention(), attention(joined=True)
    state = separate.state_dict()
    for kind in ("weight", "bias"):
        state[f"qkv.{kind}"] = torch.cat([state.pop(f"{name}.{kind}") for name in "qkv"])
    joined.load_state_dict(state)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    torch.testing.assert_close(joined(x, frames=3), separate(x, frames=3))


@torch.no_grad()
def test_permutations(form):
    """Frames that change places, and tokens that change places in every frame, do so in the output."""
    layer = attention()
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    out = layer(x.flatten(1, 2), frames=3).view_as(x)
    frames, tokens = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(layer(x[:, frames].flatten(1, 2), frames=3).view_as(x), out[:, frames])
    torch.testing.assert_close(layer(x[:, :, tokens].flatten(1, 2), frames=3).view_as(x), out[:, :, tokens])


@torch.no_grad()
def test_equal_frames(form):
    """If all frames are equal, the track is constant, and the second attention changes nothing."""
    layer = attention()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x.repeat(1, 3, 1), frames=3), layer(x).repeat(1, 3, 1))


@torch.no_grad()
def test_two_frames_of_one_number(form):
    layer = TrajectoryAttention(1, 1, dtype=torch.float64)
    for parameter in layer.parameters():
        parameter.fill_(parameter.dim() > 1)
    found = layer(torch.tensor([[[1.0], [2.0]]], dtype=torch.float64), frames=2)
    torch.testing.assert_close(found.flatten(), torch.tensor([1.731059, 1.880797]).double(), rtol=0, atol=1e-6)


def test_hooked_layers_are_called():
    """With something attached to `proj_kv`, the layer is called; the result is the same."""
    layer = attention()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    wanted, called = layer(x, frames=3), []
    layer.proj_kv.register_forward_hook(lambda *_: called.append(True))
    torch.testing.assert_close(layer(x, frames=3), wanted)
    assert called


def test_dropout_acts_in_training_only():
    layer = attention(attention_dropout=0.5)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    assert torch.equal(layer(x, frames=3), layer(x, frames=3))
    layer.train()
    assert not torch.equal(layer(x, frames=3), layer(x, frames=3))


def test_refused_arguments():
    with pytest.raises(InputError, match="heads must divide dim=16, got 3"):
        TrajectoryAttention(16, 3)
    x = torch.randn(1, 10, 16, dtype=torch.float64)
    with pytest.raises(InputError, match="frames must divide the number of tokens, got 3 and 10"):
        attention()(x, frames=3)
    with pytest.raises(InputError, match="pass no key, no value"):
        attention(joined=True)(x, x)
