"""What selectors cover of dense attention: against masks from whole matrices."""

import pytest
import timm
import torch
from support.mixer_contract import place_of

from terrazzo import convert_attention
from terrazzo.backbones.mixers import Host, create_mixer
from terrazzo.kernels.block_sparse_attention import Plan, Segment
from terrazzo.kernels.block_sparse_attention.plan import plan_to_mask
from terrazzo.tools.inspect.coverage import mass_of, selected, softmax_weights, watched


def given(grid, prefix):
    torch.manual_seed(0)
    count = prefix + grid[0] * grid[1]
    q, k, v = torch.randn(3, 2, 2, count, 8)
    return q, k, v, place_of(grid, prefix, torch.randn(2, count, 16), k)


ORDER = torch.tensor([3, 1, 12, 0, 7, -1, 3, 9])
PLANS = {
    "blocks": Plan([Segment("block", torch.tensor([[0, 2], [1, -1], [3, 0], [2, 2]])[None, None])], 4, 4),
    "one list of tokens": Plan([Segment("token", torch.tensor([[[[5, 0, 9, -1]]]]))], 4, 4),
    "two segments": Plan(
        [
            Segment("token", torch.tensor([[[[1]]]])),
            Segment("block", torch.tensor([[[[0], [1], [2], [3]]]]), count=torch.tensor([[[1, 0, 1, 1]]])),
        ],
        4,
        4,
    ),
    "all but padding": Plan([Segment("all", key_mask=(torch.arange(13) < 11)[None])], 4, 4),
    "queries in several slots": Plan([Segment("block", torch.tensor([[[[0], [2]]]]))], 4, 4, ORDER[None, None], "mean"),
}


@pytest.mark.parametrize("name", PLANS)
def test_selected_keys_are_the_masks_rows(name):
    query, key = torch.randn(2, 2, 3, 13, 8)
    sample = torch.tensor([0, 3, 4, 12])
    wanted = plan_to_mask(PLANS[name], query, key)[:, :, sample].unflatten(3, (-1, 13)).any(3)  # in any segment
    assert torch.equal(selected(PLANS[name], sample, query, key), wanted)


def test_keys_that_are_derived_cover_nothing():
    query, key = torch.randn(2, 1, 1, 8, 4)
    plan = Plan([Segment("all", key=torch.randn(1, 1, 2, 4), value=torch.randn(1, 1, 2, 4))], 4, 4)
    assert not selected(plan, torch.tensor([0, 7]), query, key).any()


@pytest.mark.parametrize("grid", [(8, 8), (7, 11)])
def test_mass(grid):
    """All tiles chosen cover everything; fewer tiles cover their own weights and those of the tokens in front."""
    q, k, v, place = given(grid, 1)
    host = Host(16, 2, 8)
    every = create_mixer("llsa", host, level=1, topk=99, dense_up_to=0)
    assert mass_of(every, q, k, v, place) == pytest.approx(1, abs=1e-6)
    few = create_mixer("llsa", host, level=1, topk=1, edge=4, part=None, dense_up_to=0)
    tokens = few.tokens(q, k, v, place)
    order = tokens.tiles.order()
    mask = plan_to_mask(few.plan(tokens), tokens.query, tokens.key)[..., -len(order) :]  # the last segment's keys
    total = 0.0
    for query, patch in enumerate(order.tolist()):
        if patch >= 0:
            weights = softmax_weights(q[:, :, 1 + patch, None], k, place)[:, :, 0]
            on = [weights[..., 0]] + [
                weights[..., 1 + p] * mask[:, :, query, i] for i, p in enumerate(order.tolist()) if p >= 0
            ]
            total += sum(on).mean().item()
    found = mass_of(few, q, k, v, place, sampled=1000)
    assert found == pytest.approx(total / (grid[0] * grid[1]), abs=1e-5)
    assert 0.1 < found < 0.9


def test_a_model_is_counted_layer_by_layer():
    model = convert_attention(timm.create_model("test_vit"), "llsa", layers=(0, 2), level=1, topk=1, dense_up_to=0)
    model = convert_attention(model.eval(), "hedgehog", layers=(1,))
    with watched(model) as coverage, torch.inference_mode():
        model(torch.randn(1, 3, 160, 160))
    assert (len(coverage.densities), len(coverage.masses)) == (2, 2)
    assert 0 < coverage.density < 1
    assert 0 < coverage.mass < 1
    with watched(convert_attention(model, "softmax")) as coverage, torch.inference_mode():
        model(torch.randn(1, 3, 160, 160))
    assert coverage.density is coverage.mass is None


@torch.no_grad()
def test_a_mixer_that_plans_for_some_heads_has_a_density_alone():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=96, embed_dim=64, num_heads=4, depth=2).eval()
    convert_attention(vit, "routing", clusters=4, edge=3, dense_up_to=0)
    with watched(vit) as coverage:
        vit(torch.zeros(1, 3, 96, 96))
    # 36 patches and a class token: 2 heads in 4 tiles of 9 patches, 2 heads in 4 clusters of 9 queries and 9 keys.
    assert coverage.density == pytest.approx((9 + 1) / 37)
    assert coverage.mass is None
