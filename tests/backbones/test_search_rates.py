"""The search for DiffRate's schedule: what is searched is what runs, and the multiply-adds reach the wanted part."""

import copy

import pytest
import torch
from support.seeded import build, image
from torch.utils.flop_counter import FlopCounterMode

import terrazzo
from terrazzo.backbones._rates import Counts, Rates, masked_attention
from terrazzo.errors import InputError, NonFiniteError

SMALL = dict(img_size=112, embed_dim=48, num_heads=3, depth=4, num_classes=10)
HOSTS = ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224")


def vit(name: str = HOSTS[0], **options) -> torch.nn.Module:
    return build(name, **SMALL | options)


def batches(count: int, size: int = 112):
    for step in range(count):
        yield torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(step))


def set_to(counts: Counts, number: int) -> None:
    """Counts that choose a number, but keep a share of each other number."""
    with torch.no_grad():
        counts.logits.copy_(-3 * (torch.arange(1, len(counts.logits) + 1) - number + 0.4).abs())


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_masked_tokens_are_tokens_that_are_not_there(name):
    """With the same numbers the class tokens equal the method "diffrate", which takes tokens away."""
    model, x = vit(name).double(), image((112, 112), batch=3).double()
    numbers = ((40, 33), (33, 33), (20, 9))
    rates = Rates((1, 2, 3), 49)
    for pair, drops, merges in zip(numbers, rates.drops, rates.merges):
        set_to(drops, pair[0])
        set_to(merges, pair[1])
    assert rates.kept() == numbers
    whole = 49 + model.num_prefix_tokens
    keep = [[(part + model.num_prefix_tokens) / whole for part in pair] for pair in numbers]
    reduced = terrazzo.reduce(copy.deepcopy(model), method="diffrate", blocks=(1, 2, 3), keep=keep)
    wanted = reduced(x)
    assert not torch.allclose(wanted, model(x), atol=1e-4)
    reduced.reducer = rates
    torch.testing.assert_close(reduced(x), wanted, rtol=0, atol=1e-9)


@torch.no_grad()
def test_share_is_what_is_counted():
    """The part of the multiply-adds equals that of the reduced model, counted, without the stem and the head."""
    model = vit()
    host = terrazzo.reduce(copy.deepcopy(model), method="diffrate", blocks=(1, 2, 3))
    rates = Rates((1, 2, 3), 49)
    for pair, drops, merges in zip(((40, 33), (33, 33), (20, 9)), rates.drops, rates.merges):
        set_to(drops, pair[0])
        set_to(merges, pair[1])
    found = float(rates.share(host))
    counted = []
    for keep in ([[(n + 1) / 50 for n in pair] for pair in rates.kept()], [[1, 1]] * 3):
        reduced = terrazzo.reduce(copy.deepcopy(model), method="diffrate", blocks=(1, 2, 3), keep=keep)
        with FlopCounterMode(display=False) as counter:
            reduced(image((112, 112)))
        blocks = [
            counter.flop_counts[f"{type(reduced).__name__}.blocks.{i}.{part}"]
            for i in range(4)
            for part in ("attn", "mlp")
        ]
        counted.append(sum(sum(operators.values()) for operators in blocks))
    assert found == pytest.approx(counted[0] / counted[1], rel=0.01)  # the choice of tokens has a row of attention


@pytest.mark.long
@pytest.mark.parametrize("labelled", [False, True])
def test_the_wanted_part_is_reached(labelled):
    model = vit().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = ((x, torch.tensor([1, 2])) if labelled else x for x in batches(40))
    found = terrazzo.search_rates(model, data, flops=0.75, lr=0.1)
    assert found["blocks"] == (1, 2, 3)
    numbers = [round(50 * part) for pair in found["keep"] for part in pair]
    assert numbers == sorted(numbers, reverse=True)
    reduced = terrazzo.reduce(copy.deepcopy(model), method="diffrate", **found).eval()
    rates = Rates(found["blocks"], 49)
    for pair, drops, merges in zip(found["keep"], rates.drops, rates.merges):
        set_to(drops, round(50 * pair[0]) - 1)
        set_to(merges, round(50 * pair[1]) - 1)
    assert rates.share(reduced).item() == pytest.approx(0.75, abs=0.03)
    assert reduced(torch.cat(list(batches(1)))).shape == (2, 10)
    assert model.training
    assert type(model) is type(vit())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients():
    """Masked attention has the slopes of its formula, also for masked keys; counts get a gradient by their ranks."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 2, 5, 4, generator=generator)
    size = torch.rand(1, 5, generator=generator) + 0.5
    weight = torch.randn(1, 2, 5, 5, generator=generator)
    mask = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]], requires_grad=True)
    out = masked_attention(query, key, size, mask)
    torch.testing.assert_close(out.sum(3), torch.ones(1, 2, 5))
    assert (out[..., 1][..., [0, 2, 3, 4]] == 0).all()
    (gradient,) = torch.autograd.grad((out * weight).sum(), mask)
    for index in range(5):
        step = torch.zeros(1, 5)
        step[0, index] = 1e-2
        with torch.no_grad():
            slope = (
                weight
                * (masked_attention(query, key, size, mask + step) - masked_attention(query, key, size, mask - step))
            ).sum() / 2e-2
        assert float(gradient[0, index]) == pytest.approx(float(slope), abs=2e-3)
    counts = Counts(6)
    kept = counts.kept(torch.tensor([[2, 0, 1, 5, 4, 3]]), before=6)
    assert kept.tolist() == [[1, 1, 1, 0, 0, 1]]  # the mean of 1 to 6, rounded up, is 4: rank 3 stays
    kept[0, 3].backward()
    assert counts.logits.grad[-1] > 0 > counts.logits.grad[0]  # a token that helps raises the number


def short(model, data, **options):
    """A search of a few steps, which ends wherever it is."""
    with pytest.warns(UserWarning, match=r"the search ended at 0\.\d\d of the multiply-adds, and 0\.90 was asked for"):
        return terrazzo.search_rates(model, data, flops=0.9, **options)


def test_blocks_are_in_order():
    """Numbers fall from block to block, in whatever order blocks are given; one block is found in any model."""
    found = short(vit(), batches(2), blocks=(3, 1, 3))
    assert found["blocks"] == (1, 3)
    numbers = [part for pair in found["keep"] for part in pair]
    assert numbers == sorted(numbers, reverse=True)


@pytest.mark.parametrize("classes", [0, 10])
def test_class_tokens_are_compared(classes):
    """A model that gives all tokens is compared by its class token: masked patches do not count."""
    seen = []

    def loss(found, wanted):
        seen.append((found.shape, wanted.shape))
        return (found - wanted).square().mean()

    for model in (vit(num_classes=classes), vit(num_classes=classes, global_pool="")):
        short(model, batches(1), loss=loss)
    assert seen == [((2, classes or 48), (2, classes or 48))] * 2
    short(build(HOSTS[0], features_only=True, **{**SMALL, "num_classes": 0}), batches(1))


@torch.no_grad()
def test_converted_blocks():
    """Blocks in front of the first reducing block keep their mixers; a mixer behind it is refused."""
    model, x = terrazzo.convert_attention(vit(), "na", layers=[0], kernel=3), image((112, 112))
    rates = Rates((1, 2, 3), 49)
    for counts in (*rates.drops, *rates.merges):
        set_to(counts, 49)
    reduced = terrazzo.reduce(copy.deepcopy(model), method="diffrate", blocks=(1, 2, 3))
    reduced.reducer = rates
    torch.testing.assert_close(reduced(x), model(x))
    short(model, batches(1))
    with pytest.raises(InputError, match="layer 2 has the mixer 'hedgehog'"):
        terrazzo.search_rates(terrazzo.convert_attention(vit(), "hedgehog", layers=[2]), batches(1), flops=0.9)


def test_forms_of_batches():
    """One tensor, lists as data loaders give them, half precision, autocast and checkpointing."""
    x = next(batches(1))
    wanted = short(vit(), x)
    assert short(vit(), [[x]]) == wanted
    assert short(vit(), [x.double()]) == wanted
    model = vit()
    model.set_grad_checkpointing()
    assert short(model, [x]) == wanted
    short(vit().bfloat16(), [x])
    with torch.autocast("cpu", torch.bfloat16):
        short(vit(), [x])
    query = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    given = query, query.flip(2), torch.ones(1, 9), torch.ones(1, 9)
    with torch.autocast("cpu", torch.bfloat16):
        found = masked_attention(*given)
    assert torch.equal(found, masked_attention(*given))


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({}, dict(flops=0), "flops must be above 0"),
        ({}, dict(flops=1.5), "up to 1"),
        ({}, dict(flops=0.5, lr=0), "lr above 0"),
        ({}, dict(flops=0.01), r"leave at least 0\.\d\d of the multiply-adds, and flops is 0\.01"),
        ({}, dict(flops=0.5, blocks=(7,)), "blocks must be some of 0 to 3"),
        ({}, dict(flops=0.5, blocks=()), "names no block"),
        (dict(global_pool="avg"), dict(flops=0.5), "reads the class token"),
        (dict(class_token=False, global_pool="avg"), dict(flops=0.5), "no class token"),
    ],
)
def test_refusals(options, given, message):
    with pytest.raises(InputError, match=message):
        terrazzo.search_rates(vit(**options), batches(1), **given)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no batch"),
        ([torch.zeros(3, 112, 112)], r"got a tensor \(3, 112, 112\)"),
        ([{"image": torch.zeros(1, 3, 112, 112)}], "got a dict"),
        ([(torch.zeros(1, 3, 112, 112), torch.zeros(1), torch.zeros(1))], "got a tuple"),
        ([(torch.zeros(1, 3, 112, 112), torch.zeros(1))], "no classes, so labels need a loss"),
        ([torch.zeros(1, 3, 128, 128)], "does not take these images: Input height"),
    ],
)
def test_refused_batches(data, message):
    model = vit(num_classes=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        terrazzo.search_rates(model, data, flops=0.9)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "reducer")


def test_other_refusals():
    model = vit(dynamic_img_size=True)
    with pytest.raises(InputError, match="one size"):
        terrazzo.search_rates(model, [*batches(1), *batches(1, 128)], flops=0.5)
    with pytest.raises(InputError, match="plain VisionTransformer"):
        terrazzo.search_rates(torch.nn.Linear(2, 2), batches(1), flops=0.5)
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        terrazzo.search_rates(model, batches(1), flops=0.5)
    with pytest.raises(NonFiniteError, match="nan at step 0"):
        terrazzo.search_rates(model, batches(1), flops=0.5, loss=lambda found, wanted: found.sum() * float("nan"))
