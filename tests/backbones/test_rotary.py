"""Rotary positions of merged and dropped tokens, in timm's Evas."""

import copy
import math

import pytest
import torch
from support.seeded import build, image
from timm.layers import apply_rot_embed_cat
from timm.models.eva import Eva

import terrazzo
from terrazzo.backbones import _rotary
from terrazzo.backbones._hosts import make_host
from terrazzo.backbones._reduce import reduce
from terrazzo.kernels.token_reduction import Plan

SMALL = dict(embed_dim=48, num_heads=3, depth=3, img_size=128)
REDUCTIONS = {
    "ahead": dict(r=8),
    "merged before": dict(r=8, criteria=(1, 0, 40)),
    "windows": dict(r=3, blocks=(1,), window=5, global_blocks=(2,)),
    "windows ahead": dict(r=3, blocks=(1,), window=4, global_blocks=(2,), criteria=(1, 0, 40)),
    "masked": dict(method="asvit", blocks=(1, 2), thresholds=(0.0150, 0.0150), form="masked"),
    "packed": dict(method="asvit", blocks=(1, 2), thresholds=(0.0150, 0.0150), form="packed"),
    "fixed": dict(method="asvit", blocks=(1, 2), form="fixed", keep=(0.7, 0.4)),
}


SLOW = pytest.mark.slow


def many(**options):
    """An Eva with all that its attention can have: shared heads of keys, norms, a gate, separate projections."""
    torch.manual_seed(0)
    vit = Eva(
        **SMALL | dict(num_heads=4),
        attn_type="rope",
        num_kv_heads=2,
        qkv_fused=False,
        qk_norm=True,
        scale_attn_inner=True,
        use_rot_pos_emb=True,
        rope_type="dinov3",
        num_classes=10,
        **options,
    ).eval()
    for block in vit.blocks:
        block.attn.gate = torch.nn.Linear(48, 48)
    return vit


MODELS = {
    "axial": lambda: build("vit_small_patch16_dinov3", **SMALL),
    "biases": lambda: build("eva02_tiny_patch14_224", **SMALL | dict(img_size=112), qkv_fused=True),
    "mixed": lambda: build("vit_small_patch16_rope_mixed_224", **SMALL),
    "many": many,
}


def picture(vit, batch=1):
    side = 8 * vit.patch_embed.patch_size[0]
    return image((side, side), batch=batch)


@pytest.fixture(params=MODELS)
def vit(request):
    return MODELS[request.param]()


def angles(count, frequencies=4, seed=0):
    """Rotary positions (count, 2 D) of random angles up to 1, and the angles."""
    found = torch.rand(count, frequencies, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.cat([found.sin(), found.cos()], -1), found


class TestPositions:
    def test_mean_of_angles(self):
        """Two patches stand at the middle of their angles, whatever their sizes in sum; one patch stays where it is."""
        rope, angle = angles(3)
        standing = Plan(torch.tensor([[0, 1, 2, 1]]), 3)
        found = _rotary.unit(_rotary.pooled(rope, standing, None, prefix=1))[0, 0]
        wanted = torch.stack([(angle[0] + angle[2]) / 2, angle[1]])
        torch.testing.assert_close(found, torch.cat([wanted.sin(), wanted.cos()], -1))
        weight = torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
        found = _rotary.unit(_rotary.pooled(rope, standing, weight, prefix=1))[0, 0]
        torch.testing.assert_close(found, rope[:2])

    def test_heads_have_their_own(self):
        ropes = [angles(5, seed=seed)[0] for seed in range(3)]
        standing = Plan(torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 1]]), 2)
        together = _rotary.pooled(torch.stack(ropes), standing, None, prefix=0)
        apart = [_rotary.pooled(rope, standing, None, prefix=0) for rope in ropes]
        torch.testing.assert_close(together, torch.cat(apart, 1))
        index = torch.tensor([[4, 0], [1, 1]])
        taken = _rotary.taken(torch.stack(ropes), index)
        assert torch.equal(taken, torch.stack([torch.stack([rope[row] for rope in ropes]) for row in index]))

    def test_angles_that_cancel_out(self):
        """Two opposite angles have no mean; the gradient stays finite."""
        rope = torch.tensor([[0.0, 1.0], [0.0, -1.0]], requires_grad=True)
        found = _rotary.unit(_rotary.pooled(rope, Plan(torch.tensor([[0, 0]]), 1), None, prefix=0))
        assert found.abs().max() <= 1
        found.sum().backward()
        assert rope.grad.isfinite().all()

    def test_tokens_in_front_are_not_turned(self):
        rope, _ = angles(3)
        x = torch.randn(5, 4, dtype=torch.float64)
        found = apply_rot_embed_cat(x, _rotary.with_front(rope, 2))
        assert torch.equal(found, torch.cat([x[:2], apply_rot_embed_cat(x[2:], rope)]))

    @torch.no_grad()
    @pytest.mark.parametrize("options", [REDUCTIONS["ahead"], REDUCTIONS["merged before"], REDUCTIONS["windows"]])
    def test_follow_the_tokens(self, options):
        """After any number of merges, a token stands at the mean of all its patches."""
        vit = reduce(build("vit_small_patch16_dinov3", **SMALL).double(), **options)
        x, state = vit._begin(picture(vit, batch=2).double(), maps=True)
        (rope,) = {id(rope): rope for rope in state.ropes.values()}.values()
        for block in vit.blocks[:-1]:
            x = block(x, state)
        owner = vit.reducer.assignment(state)[:, vit.num_prefix_tokens :] - vit.num_prefix_tokens
        found = state.rope
        assert found.shape[2] == x.shape[1] - vit.num_prefix_tokens
        for image_, tokens in zip(found[:, 0], owner):
            for token in set(tokens.tolist()):
                torch.testing.assert_close(image_[token], _rotary.unit(rope[tokens == token].mean(0)))


@torch.no_grad()
def test_without_merging_nothing_changes(vit):
    x = picture(vit)
    wanted = vit(x)
    assert torch.equal(reduce(copy.deepcopy(vit), r=0)(x), wanted)
    found = reduce(copy.deepcopy(vit), method="asvit", blocks=(1, 2), form="fixed", keep=(1, 1))(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_equal_tokens_merge_without_loss():
    """Patches with equal features and positions are merged, and the tokens in front do not notice."""
    vit = build("vit_small_patch16_dinov3", **SMALL).double()
    prefix = vit.num_prefix_tokens
    make_host(vit)
    plain, model = copy.deepcopy(vit), reduce(vit, r=16, blocks=(1,), criteria=(1, 0, 0), bidirectional=False)
    patches = picture(vit).double()
    outs = []
    for host in (plain, model):
        x, state = host._begin(patches, maps=False)
        twice = torch.arange(64) // 2 * 2
        x = torch.cat([x[:, :prefix], x[:, prefix + twice]], 1)
        state.ropes = {i: rope[twice] for i, rope in state.ropes.items()}
        for block in host.blocks:
            x = block(x, state)
        outs.append(x)
    assert outs[1].shape[1] == outs[0].shape[1] - 16
    torch.testing.assert_close(outs[1][:, :prefix], outs[0][:, :prefix])


@torch.no_grad()
def test_windows_by_hand():
    """A block within windows equals the block on each window, with the window's positions."""
    vit = reduce(build("vit_small_patch16_dinov3", **SMALL).double(), r=0, blocks=(), window=5, global_blocks=(2,))
    x, state = vit._begin(picture(vit).double(), maps=True)
    prefix, rope = vit.num_prefix_tokens, state.ropes[0].unflatten(0, (8, 8))
    front, body = x[:, :prefix], x[:, prefix:].unflatten(1, (8, 8))
    wanted = torch.empty_like(body)
    for rows in (slice(0, 4), slice(4, 8)):
        for columns in (slice(0, 4), slice(4, 8)):
            part = torch.cat([front, body[:, rows, columns].flatten(1, 2)], 1)
            out = vit.blocks[0](part, rope=rope[rows, columns].flatten(0, 1))
            wanted[:, rows, columns] = out[:, prefix:].unflatten(1, (4, 4))
    found = vit.reducer.restored(vit.blocks[0](x, state), state, "copy")[:, prefix:]
    torch.testing.assert_close(found, wanted.flatten(1, 2))


@torch.no_grad()
def test_padded_windows():
    """A grid that windows do not divide, with merging in windows and then on the whole image."""
    vit = build("vit_small_patch16_dinov3", **SMALL | dict(img_size=(112, 176)))
    x = image((112, 176), batch=2)
    wanted = vit.forward_intermediates(x, indices=[2], intermediates_only=True)[0]
    found = reduce(vit, **REDUCTIONS["windows"]).forward_intermediates(x, indices=[2], intermediates_only=True)[0]
    assert torch.cosine_similarity(found, wanted, dim=1).mean() > 0.9


@torch.no_grad()
def test_positions_matter():
    """With the grid's first positions for all tokens instead of their own, merged tokens give other results."""
    vit = reduce(build("vit_small_patch16_dinov3", **SMALL), **REDUCTIONS["ahead"])
    x, state = vit._begin(picture(vit), maps=False)
    other, wrong = x, state.copy()
    for block in vit.blocks:
        x = block(x, state)
        wrong.moved()
        count = other.shape[1] - vit.num_prefix_tokens
        wrong.followed = lambda rope, count=count: rope[:count]
        other = block(other, wrong)
    assert x.shape == other.shape
    assert not torch.allclose(x, other, atol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=() if name == ("windows ahead" if kind == "axial" else "ahead") else SLOW)
        for kind in MODELS
        for name in REDUCTIONS
    ],
)
def test_every_model_with_every_reduction(kind, name):
    """Maps stay near the model's; a batch is its images; copies, compiled models and checkpointing agree."""
    vit, options = MODELS[kind](), REDUCTIONS[name]
    x, plain = picture(vit, batch=2), copy.deepcopy(vit)
    model = reduce(vit, **options)
    with torch.no_grad():
        wanted = plain.forward_intermediates(x, indices=[2], intermediates_only=True)[0]
        found = model.forward_intermediates(x, indices=[2], intermediates_only=True)[0]
        assert torch.cosine_similarity(found, wanted, dim=1).mean() > 0.7
        logits = model(x)
        assert not torch.equal(logits, plain(x))
        torch.testing.assert_close(model(x[1:]), logits[1:], rtol=1e-3, atol=1e-4)
        assert torch.equal(copy.deepcopy(model)(x), logits)
        if options.get("form") != "packed":
            torch.compiler.reset()
            compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
            torch.testing.assert_close(compiled, logits, rtol=1e-3, atol=1e-4)
    if options.get("form") == "packed":
        return
    model.train()
    grads = []
    for again in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(again)
        model(x).square().mean().backward()
        grads.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert all(grad.isfinite().all() for grad in grads[0].values())
    unused = {key for key, p in model.named_parameters() if p.grad is None}
    assert not {key for key in unused if key.startswith("blocks")}, "these get no gradient"
    for key, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][key], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_with_a_mixer():
    """A mixer without a grid gets rotated queries and keys of merged tokens."""
    vit = build("vit_small_patch16_dinov3", **SMALL, global_pool="token")
    model = terrazzo.convert_attention(reduce(vit, **REDUCTIONS["merged before"]), "hedgehog")
    x = picture(model, batch=2)
    assert model.forward_features(x).shape[1] == 64 + model.num_prefix_tokens - 16
    assert math.isfinite(model.forward_features(x).sum())
