"""`terrazzo.conversion_plan`, and `terrazzo.convert_attention` with layers that it chooses."""

import copy
import dataclasses
import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from support.seeded import build, image

import terrazzo
from terrazzo.errors import InputError

SMALL = dict(embed_dim=48, num_heads=3, depth=3, img_size=64, patch_size=16)
# The models have, in turn: a class token and logits; a class token, layer scale and no classifier; rotary positions
# with registers; mean pooling, whose final tokens have no norm.
MODELS = {
    "vit_tiny_patch16_224": dict(SMALL, num_classes=7),
    "vit_small_patch14_dinov2": SMALL,
    "vit_small_patch16_dinov3": SMALL,
    "vit_base_patch16_clip_224": dict(SMALL, num_classes=5, global_pool="avg"),
}
BATCH = image((64, 64), batch=3)


@pytest.fixture(scope="module", params=MODELS)
def vit(request):
    return sharp(request.param)


def sharp(name="vit_tiny_patch16_224"):
    """A small model whose attention is far from uniform, so that layers differ."""
    model = build(name, **MODELS[name])
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            block.attn.qkv.weight.mul_(4 + 4 * layer)
    return model


def output(model, x):
    """The final tokens, and KL's distribution."""
    tokens = model.forward_features(x)
    if model.num_classes:
        return tokens, model(x).double().log_softmax(-1)
    return tokens, F.layer_norm(tokens, tokens.shape[-1:]).double().log_softmax(-1)


@torch.no_grad()
def converted_by_hand(vit, layers, mixer="hedgehog"):
    """KL, final tokens, and attention's output in each layer."""
    model, seen = terrazzo.convert_attention(copy.deepcopy(vit), mixer, layers=layers), []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, given, out: seen.append(out))
    tokens, logs = output(model, BATCH)
    wanted, target = output(vit, BATCH)
    kl = (target.exp() * (target - logs)).sum(-1).mean().item()
    return kl, tokens, wanted, seen[: len(model.blocks)]


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def test_rows(vit):
    """Each row is what the conversion of this layer alone does, in any split into batches."""
    plan = terrazzo.conversion_plan(vit, "hedgehog", iter(BATCH.split(2)))
    attended = converted_by_hand(vit, [])[3]
    for row in plan.rows:
        kl, tokens, wanted, seen = converted_by_hand(vit, [row.layer])
        assert row.divergence == pytest.approx(kl, rel=1e-2, abs=1e-9)
        found, target = seen[row.layer], attended[row.layer]
        assert row.attention_error == pytest.approx(relative(found, target), rel=1e-3)
        front = vit.num_prefix_tokens
        assert row.prefix_error == (front and pytest.approx(relative(found[:, :front], target[:, :front]), rel=1e-3))
        assert row.token_error == pytest.approx(relative(tokens, wanted), rel=1e-3)
        assert row.token_cosine == pytest.approx(F.cosine_similarity(tokens, wanted, dim=-1).mean().item(), abs=1e-4)
    divergences = [row.divergence for row in plan.rows]
    assert divergences == sorted(divergences)
    for count, row in enumerate(plan.rows, 1):
        kl = converted_by_hand(vit, [row.layer for row in plan.rows[:count]])[0]
        assert row.cumulative == pytest.approx(kl, rel=1e-2, abs=1e-9)
    assert plan.images == 3
    assert plan.of == ("logits" if vit.num_classes else "features")
    assert plan.layers == tuple(row.layer for row in plan.rows)
    assert type(vit).__name__ in ("VisionTransformer", "Eva")
    said = str(plan).splitlines()
    assert len(said) == 5
    assert said[0].startswith("hedgehog in place of attention, 3 images, KL of")
    assert {len(line) for line in said[1:]} == {len(said[1])}


def test_budget_and_max_kl():
    vit = sharp()
    plan = terrazzo.conversion_plan(vit, "hedgehog", BATCH)
    order, together = plan.layers, [row.cumulative for row in plan.rows]
    for budget in (1, 2, 3):
        model = terrazzo.convert_attention(copy.deepcopy(vit), "hedgehog", "auto", budget=budget, images=[BATCH])
        assert set(model.conversion) == set(order[:budget])
    for limit, budget, count in (
        (together[0] / 2, None, 0),
        (sum(together[:2]) / 2, None, 1),
        (100, None, 3),
        (100, 2, 2),
    ):
        given = copy.deepcopy(vit)
        model = terrazzo.convert_attention(given, "hedgehog", "auto", max_kl=limit, budget=budget, images=BATCH)
        assert model is given
        assert set(getattr(model, "conversion", {})) == set(order[:count])
        assert type(model).__name__ == ("HostViT" if count else "VisionTransformer")


def test_greedy():
    """Each step takes the layer with which the whole output is nearest."""
    vit = sharp("vit_small_patch14_dinov2")
    plan = terrazzo.conversion_plan(vit, "hedgehog", BATCH, greedy=True, budget=2)
    first = min(range(3), key=lambda i: converted_by_hand(vit, [i])[0])
    second = min({0, 1, 2} - {first}, key=lambda i: converted_by_hand(vit, [first, i])[0])
    assert plan.layers == (first, second)
    assert [row.layer for row in plan.rows] == [first, second, 3 - first - second]
    kl = converted_by_hand(vit, [first, second])[0]
    assert plan.rows[1].cumulative == pytest.approx(kl, rel=1e-3)
    assert plan.rows[2].cumulative is None
    model = terrazzo.convert_attention(vit, "hedgehog", layers="greedy", max_kl=kl * 1.001, images=BATCH)
    assert set(model.conversion) >= {first, second}


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}, type(model), model.training


def assert_same(model, before):
    state, kind, training = before
    assert (type(model), model.training) == (kind, training)
    found = model.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(m.training == training for m in model.modules())


@pytest.mark.parametrize("was_converted", [False, True])
def test_nothing_changes_after_an_error(was_converted):
    """Also if the second batch fails, and in training mode."""
    vit = sharp().train()
    if was_converted:
        terrazzo.convert_attention(vit, "hedgehog", layers=[1])
    before, mixer = state_of(vit), getattr(vit.blocks[1].attn, "mixer", None)

    def broken():
        yield BATCH
        raise OSError("the disk is gone")

    for images, error in ((broken(), OSError), ([BATCH, "text"], InputError), ([], InputError)):
        with pytest.raises(error):
            terrazzo.convert_attention(vit, "hedgehog", layers="auto", budget=1, images=images)
        assert_same(vit, before)
        assert getattr(vit.blocks[1].attn, "mixer", None) is mixer
    terrazzo.conversion_plan(vit, "hedgehog", BATCH)
    assert_same(vit, before)


def trained(layers, name="vit_tiny_patch16_224"):
    """A model with mixers that are not as they began."""
    model = terrazzo.convert_attention(sharp(name), "hedgehog", layers=layers)
    with torch.no_grad():
        for layer in layers:
            for parameter in model.blocks[layer].attn.mixer.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(layer)))
    return model


@torch.no_grad()
def test_trained_mixers_are_measured_and_kept():
    model = trained([0, 2])
    own = {i: model.blocks[i].attn.mixer for i in (0, 2)}
    fresh = terrazzo.conversion_plan(sharp(), "hedgehog", BATCH)
    plan = terrazzo.conversion_plan(model, "hedgehog", BATCH)
    rows, before = ({row.layer: row.attention_error for row in x.rows} for x in (plan, fresh))
    assert rows[1] == pytest.approx(before[1])
    assert all(rows[i] != pytest.approx(before[i], rel=1e-2) for i in (0, 2))
    states = {i: copy.deepcopy(mixer.state_dict()) for i, mixer in own.items()}
    terrazzo.convert_attention(model, "hedgehog", layers="auto", budget=2, images=BATCH)
    assert set(model.conversion) == set(plan.layers[:2])
    for layer in plan.layers[:2]:
        if layer in own:
            assert model.blocks[layer].attn.mixer is own[layer]
            found = model.blocks[layer].attn.mixer.state_dict()
            assert all(torch.equal(found[key], value) for key, value in states[layer].items())


@torch.no_grad()
def test_teacher():
    """After a training that also changed projections, layers without the mixer have the teacher's attention."""
    teacher, model = sharp(), trained([0, 1, 2])
    for block in model.blocks:
        block.attn.proj.weight.mul_(1.2)
        block.attn.qkv.weight.mul_(0.9)
    plan = terrazzo.conversion_plan(model, "hedgehog", BATCH, teacher=teacher)
    by_hand = copy.deepcopy(model)
    for layer in plan.layers[1:]:
        terrazzo.convert_attention(by_hand, "softmax", layers=[layer])
        by_hand.blocks[layer].attn.load_state_dict(teacher.blocks[layer].attn.state_dict())
    target, logs = (output(x, BATCH)[1] for x in (teacher, by_hand))
    kl = (target.exp() * (target - logs)).sum(-1).mean().item()
    assert plan.rows[0].divergence == pytest.approx(kl, rel=1e-2)
    same, one = copy.deepcopy(model), dataclasses.replace(plan, layers=plan.layers[:1])
    terrazzo.convert_attention(model, "hedgehog", layers="auto", budget=1, images=BATCH, teacher=teacher)
    terrazzo.convert_attention(same, "hedgehog", layers=one, teacher=teacher)
    for found in (model, same):
        torch.testing.assert_close(found(BATCH), by_hand(BATCH))
        assert set(found.conversion) == set(plan.layers[:1])


def test_a_plan_for_another_model():
    plan = terrazzo.conversion_plan(sharp(), "hedgehog", BATCH, budget=2)
    other = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    others = terrazzo.convert_attention(sharp(), "linear_infsa", layers=plan.layers)
    for model, arguments, message in (
        (sharp(), dict(mixer="linear_infsa", layers=plan), "for the mixer 'hedgehog', and not for 'linear_infsa'"),
        (sharp(), dict(mixer="hedgehog", layers=plan, budget=1), "was measured before: leave budget out"),
        (others, dict(mixer="hedgehog", layers=plan), "which this model lacks or which have another mixer"),
        (sharp(), dict(mixer="hedgehog", layers=plan, teacher=other), "the teacher has 2 layers, 192 channels"),
    ):
        before = state_of(model)
        with pytest.raises(InputError, match=message):
            terrazzo.convert_attention(model, **arguments)
        assert_same(model, before)


@torch.no_grad()
def test_other_mixers_stay():
    model = terrazzo.convert_attention(sharp(), "linear_infsa", layers=[1])
    wanted = model.forward_features(BATCH)
    plan = terrazzo.conversion_plan(model, "hedgehog", BATCH)
    assert {row.layer for row in plan.rows} == {0, 2}
    terrazzo.convert_attention(model, "hedgehog", layers="auto", budget=1, images=BATCH)
    assert model.conversion == {1: dict(mixer="linear_infsa"), plan.layers[0]: dict(mixer="hedgehog")}
    terrazzo.convert_attention(model, "softmax", layers=[plan.layers[0]])
    assert torch.equal(model.forward_features(BATCH), wanted)


def test_a_wrapper_and_a_mixer_with_a_grid():
    """timm's wrapper for `features_only=True` has no classifier and no last norm."""
    wrapped = build("vit_tiny_patch16_224", features_only=True, out_indices=(2,), **SMALL)
    plan = terrazzo.conversion_plan(wrapped, "na", BATCH, kernel=2, budget=1)
    assert plan.of == "features"
    terrazzo.convert_attention(wrapped, "na", layers="auto", budget=1, images=BATCH, kernel=2)
    assert wrapped.model.conversion == {plan.layers[0]: dict(mixer="na", kernel=2)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(layers="auto"), "layers='auto' measures on images, up to a limit: give images=batches, and budget=N"),
        (dict(layers="greedy", images=BATCH), "layers='greedy' measures on images"),
        (dict(layers="auto", images=BATCH, budget=0), "budget must be 1 to 3, the number of layers.*got 0"),
        (dict(layers="auto", images=BATCH, budget=4), "budget must be 1 to 3"),
        (dict(layers="auto", images=BATCH, budget=1.5), "budget must be a whole number"),
        (dict(layers="auto", images=BATCH, max_kl=-1), "max_kl must be 0 or more, got -1"),
        (dict(layers="auto", images=BATCH, max_kl=float("nan")), "max_kl must be a finite number"),
        (dict(layers="auto", images=[], budget=1), "images holds no image"),
        (dict(layers="auto", images=3, budget=1), "images must be batches"),
        (dict(layers="auto", images=[(BATCH, 1)], budget=1), "images must be batches .* of tensors, got tuple"),
        (dict(layers="auto", images=BATCH[0], budget=1), "add the batch"),
        (dict(layers="auto", images=BATCH, budget=1, mixer="softmax"), "'softmax' replaces nothing"),
        (dict(layers="auto", images=BATCH, budget=1, mixer="na", kernel=4), "windows of 4 reach both sides"),
        (dict(layers="auto", images=BATCH, budget=1, topk=3), "'hedgehog' has no options, got topk"),
        (dict(layers=[0], budget=1), r"layers='auto' and layers='greedy' take budget, and layers is \[0\]"),
        (dict(images=BATCH, max_kl=1), "take max_kl and images, and layers is 'all'"),
        (dict(layers="auto", images=BATCH, budget=1, teacher=torch.nn.Identity()), "can be a teacher, got Identity"),
    ],
)
def test_errors(arguments, message):
    vit = sharp()
    before = state_of(vit)
    with pytest.raises(InputError, match=message) as refusal:
        terrazzo.convert_attention(vit, **{"mixer": "hedgehog", **arguments})
    assert "\n" not in str(refusal.value)
    assert_same(vit, before)


def test_models_that_cannot_be_planned():
    meta = timm.create_model("vit_tiny_patch16_224", device="meta")
    reduced = terrazzo.reduce(sharp(), r=2, criteria=(1, 0, 40))
    other = build("vit_tiny_patch16_224", **dict(MODELS["vit_tiny_patch16_224"], depth=2))
    everywhere = terrazzo.convert_attention(sharp(), "linear_infsa")
    for model, message in (
        (meta, "on the meta device and has no weights"),
        (reduced, "merges, drops or reorders them: plan first"),
        (everywhere, "every layer has another mixer"),
    ):
        with pytest.raises(InputError, match=message):
            terrazzo.conversion_plan(model, "hedgehog", BATCH)
    with pytest.raises(InputError, match="the teacher has 2 layers, 48 channels and 7 classes, and the model 3, 48"):
        terrazzo.conversion_plan(sharp(), "hedgehog", BATCH, teacher=other)


def test_outputs_that_are_not_finite_come_last():
    vit = trained([1])
    with torch.no_grad():
        vit.blocks[1].attn.mixer.query_map.fill_(float("nan"))
    plan = terrazzo.conversion_plan(vit, "hedgehog", BATCH)
    assert plan.rows[-1].layer == 1
    assert all(a.divergence <= b.divergence for a, b in itertools.pairwise(plan.rows))
