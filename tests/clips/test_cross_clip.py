"""The tracker across clips against the official code's packs, and the matching of queries."""

import re
import sys

import pytest
import torch
from support.golden_packs import ROOT, Pack, normal, sampled

from terrazzo.clips import CrossClipTracker, TemporalASPP, aligned
from terrazzo.errors import InputError, install_command


@pytest.mark.parametrize("name", ["cross_clip_T1", "cross_clip_T4"])
def test_golden(name):
    pack = Pack(ROOT / "axialvs" / f"{name}.npz")
    meta = pack.meta
    tracker = CrossClipTracker(meta["layers"], meta["dim"], meta["heads"]).double().eval()
    tracker.load_state_dict(pack.weights())
    assert sum(p.numel() for p in tracker.parameters()) == meta["parameters"]
    queries = normal("clip_query", (meta["batch"], meta["clips"], meta["queries"], meta["dim"])).requires_grad_()
    outputs = tracker(queries)
    assert len(outputs) == meta["layers"]
    for index, (out, stage) in enumerate(zip(outputs, meta["stages"])):
        assert list(out.shape) == stage["shape"]
        wanted = torch.from_numpy(pack.arrays[f"layer{index}"])
        torch.testing.assert_close(sampled(f"layer{index}", out), wanted, rtol=0, atol=1e-8)
    (outputs[-1] * normal("grad", outputs[-1].shape)).sum().backward()
    wanted = torch.from_numpy(pack.arrays["dclip_query"])
    torch.testing.assert_close(sampled("dclip_query", queries.grad), wanted, rtol=0, atol=1e-8)


def test_parameters_and_initial_weights():
    torch.manual_seed(0)
    tracker = CrossClipTracker()
    layers = tracker.transformer_trajectory_self_attention_layers
    assert sum(p.numel() for p in layers[0].parameters()) == 461_056
    convolutions = tracker.conv_short_aggregate_layers[0]
    assert sum(p.numel() for p in convolutions.parameters()) == 787_712
    assert sum(p.numel() for p in tracker.parameters()) == 4_997_377 - 257  # without the head's `activation_proj`
    assert convolutions._proj_conv_bn_act.conv.weight.std().item() == pytest.approx((2 / 768) ** 0.5, rel=0.01)
    assert convolutions._proj_conv_bn_act.norm.eps == 1e-6
    assert tracker.conv_norms[0].eps == layers[0].norm.eps == 1e-5


@torch.no_grad()
def test_one_clip_repeats_its_element():
    """With one clip, each tap of a convolution reads the same element."""
    layer = TemporalASPP(8).double().eval()
    x = torch.randn(3, 8, 1, dtype=torch.float64)
    torch.testing.assert_close(layer(x).expand(-1, -1, 9), layer(x.expand(-1, -1, 9)))


@torch.no_grad()
def test_half_precision():
    """The norm of the convolutions computes in float32 also where the weights are in bfloat16."""
    tracker, queries = CrossClipTracker(1, 16, 4).eval(), torch.randn(2, 3, 5, 16)
    (wanted,) = tracker(queries)
    with torch.autocast("cpu", torch.bfloat16):
        assert (tracker(queries)[0] - wanted).abs().max() < 0.1
    assert (tracker.bfloat16()(queries.bfloat16())[0].float() - wanted).abs().max() < 0.2


def test_aligned():
    torch.manual_seed(0)
    before, order = torch.randn(7, 16), torch.randperm(7)
    queries = 3 * before[order] + 0.01 * torch.randn(7, 16)  # lengths do not matter
    torch.testing.assert_close(queries[aligned(queries, before)], 3 * before, rtol=0, atol=0.1)


@pytest.mark.parametrize("shapes", [((7, 16), (6, 16)), ((7, 16), (7, 8)), ((7,), (7,))])
def test_aligned_refuses_other_shapes(shapes):
    message = f"the queries of both clips must have the same shape (Q, C), got {shapes[0]} and {shapes[1]}"
    with pytest.raises(InputError, match=re.escape(message)):
        aligned(*map(torch.ones, shapes))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_aligned_refuses_what_is_not_finite(number, place):
    given = [torch.ones(7, 16), torch.ones(7, 16)]
    given[place][3, 2] = number
    with pytest.raises(InputError, match="queries must be finite, got NaN or infinite numbers"):
        aligned(*given)


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    message = f"matching queries needs SciPy: {install_command('openmmlab')}"
    with pytest.raises(ModuleNotFoundError, match=re.escape(message)) as caught:
        aligned(torch.ones(7, 16), torch.ones(7, 16))
    assert caught.value.name == "scipy"
