"""MCTF's fine-tuning: the terms of the loss by hand, the number of merged tokens, and the random r'."""

import copy

import pytest
import timm
import torch
from mmengine.runner import set_random_seed
from torch.nn import functional as F

from terrazzo.errors import InputError
from terrazzo.openmmlab import Classifier, TokenConsistency

BACKBONE = dict(name="mctf_deit_tiny", num_classes=5, embed_dim=96, depth=3, patch_size=8, grid=(8, 8), r=9)


def classifier(r_max=4, backbone=BACKBONE, **options):
    torch.manual_seed(0)
    recipe = options.pop("recipe", dict(type="TokenConsistency", r_max=r_max))
    return Classifier(dict(backbone), recipe=recipe, **options).double().train()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 64, 64, generator=generator, dtype=torch.float64), torch.tensor([1, 0, 4, 2])


def plain(model, r):
    """A function that gives final class tokens and logits, with the same weights and a fixed r."""
    other = timm.create_model(**{**BACKBONE, "model_name": BACKBONE["name"], "r": r, "name": None}).double()
    other.load_state_dict(model.backbone.state_dict())
    tokens = other.forward_features
    return lambda x: ((found := tokens(x))[:, 0], other.head(found))


@pytest.mark.parametrize("mixed", [False, True])
def test_losses_by_hand(batch, mixed, monkeypatch):
    """The losses are both label losses, and the mean squared error of class tokens if the student is sure."""
    x, _ = batch
    options = (
        dict(mixup=dict(mixup_alpha=0.8, label_smoothing=0.1)) if mixed else dict(loss=dict(type="CrossEntropyLoss"))
    )
    model = classifier(**options)
    with torch.no_grad():
        model.backbone.head.fc.weight.mul_(40)  # so that the student is sure of some images only
        _, logits = plain(model, 9)(x)
        labels = torch.cat([logits[:1].argmax(1), logits[1:].argmin(1)])
    monkeypatch.setattr(model.recipe, "draw", lambda: 2)
    set_random_seed(3)  # the seed of mixup
    losses = model(x.clone(), labels, mode="loss")  # timm mixes in place
    set_random_seed(3)
    x, targets = model.mixup(x.clone(), labels) if mixed else (x, F.one_hot(labels, 5).double())
    with torch.no_grad():
        (student, logits), (teacher, of_teacher) = plain(model, 9)(x), plain(model, 2)(x)
    assert not torch.allclose(student, teacher, atol=1e-3)
    for name, found in (("student", logits), ("teacher", of_teacher)):
        wanted = -(targets * found.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(losses[f"loss_{name}"], wanted, rtol=1e-9, atol=0)
    error, count = 0.0, 0
    for i in range(4):
        probability = logits[i].exp() / logits[i].exp().sum()
        sure = probability[labels[i]] + (probability[labels[3 - i]] if mixed else 0)
        if sure > 0.4:
            error, count = error + ((student[i] - teacher[i]) ** 2).sum() / 96, count + 1
    assert 0 < count < 4, "all or none are sure: the test would prove nothing"
    torch.testing.assert_close(losses["loss_consistency"], 3.0 * error / count, rtol=1e-9, atol=0)
    assert losses["sure"] == count / 4


def test_where_nobody_is_sure_the_term_is_dropped(batch):
    model = classifier(recipe=dict(type="TokenConsistency", r_max=4, confidence=1.1))
    losses = model(*batch, mode="loss")
    assert losses["loss_consistency"] == 0
    assert losses["loss_student"] > 0
    losses["loss_consistency"].backward()  # the gradient is finite
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_the_teacher_stays_where_it_is(batch, monkeypatch):
    """Only the student's class token has a gradient; the teacher's is a constant, and an equal teacher gives 0."""
    x, labels = batch
    model = classifier(recipe=dict(type="TokenConsistency", r_max=4, confidence=-1.0))
    monkeypatch.setattr(model.recipe, "draw", lambda: 2)
    weight = model.backbone.blocks[1].attn.qkv.weight
    (found,) = torch.autograd.grad(model(x, labels, mode="loss")["loss_consistency"], weight)
    teacher = model.backbone.forward_features(x, r=2)[:, 0].detach()
    (wanted,) = torch.autograd.grad(3 * F.mse_loss(model.backbone.forward_features(x)[:, 0], teacher), weight)
    torch.testing.assert_close(found, wanted)
    assert found.abs().sum() > 0
    monkeypatch.setattr(model.recipe, "draw", lambda: 9)
    assert model(x, labels, mode="loss")["loss_consistency"] == 0


@pytest.mark.parametrize(("r", "r_max"), [(9, 4), (0.35, 0.15)])
def test_every_parameter_learns(batch, r, r_max):
    model = classifier(r_max, backbone=dict(BACKBONE, r=r))
    sum(value for key, value in model(*batch, mode="loss").items() if "loss" in key).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_what_is_drawn():
    """All whole numbers below r_max are drawn equally often; if r_max is below 1, hundredths are drawn."""
    torch.manual_seed(0)
    recipe = TokenConsistency(8)
    found = torch.tensor([recipe.draw() for _ in range(4000)])
    values, counts = found.unique(return_counts=True)
    assert values.tolist() == list(range(8))
    assert counts.min() > 400, "about 500 of each are expected"
    recipe = TokenConsistency(0.15)
    assert {recipe.draw() for _ in range(400)} == {i / 100 for i in range(15)}


def test_drawing_disturbs_nobody():
    """PyTorch's generator is not used; a seed restarts the draws, as in a resumed run; processes differ by seeds."""
    recipe = TokenConsistency(1000)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = [recipe.draw() for _ in range(5)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    other = [recipe.draw() for _ in range(5)]
    torch.manual_seed(5)
    assert [recipe.draw() for _ in range(5)] == first != other
    assert copy.deepcopy(recipe).draw() == recipe.draw()  # a moving average copies a model like this


def test_evaluation_may_merge_another_number(batch):
    x, _ = batch
    model = classifier(backbone=dict(BACKBONE, r_eval=0))
    with torch.no_grad():
        student, _ = plain(model, 9)(x)
        full, logits = plain(model, 0)(x)
        torch.testing.assert_close(model.backbone.forward_features(x)[:, 0], student)
        model.eval()
        torch.testing.assert_close(model.backbone.forward_features(x)[:, 0], full)
        torch.testing.assert_close(model(x), logits)
        torch.testing.assert_close(model.backbone.forward_features(x, r=9)[:, 0], student)
    assert model.backbone.forward_features(x).shape[1] == 65


@pytest.mark.parametrize(
    ("backbone", "arguments", "message"),
    [
        (BACKBONE, dict(r_max=2.5), "r_max must be a whole number"),
        (BACKBONE, dict(r_max=0), "r_max must be a whole number"),
        (dict(name="resnet18", num_classes=5), dict(r_max=8), "TokenConsistency trains MCTF, and the model is ResNet"),
        (dict(BACKBONE, r_eval=1.5), dict(r_max=8), "r_eval must be a part below 1"),
    ],
)
def test_errors(backbone, arguments, message):
    with pytest.raises(InputError, match=message):
        Classifier(backbone, recipe=dict(type="TokenConsistency", **arguments))


def test_a_probe_has_no_recipe():
    with pytest.raises(InputError, match="choose one of them"):
        Classifier(BACKBONE, probe=True, recipe=dict(type="TokenConsistency", r_max=8))
