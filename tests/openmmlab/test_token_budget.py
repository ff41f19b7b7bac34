"""AS-ViT's fine-tuning: costs, the terms of the loss by hand, the thresholds' gradient, and the teacher."""

import copy

import pytest
import timm
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from terrazzo.backbones.asvit import TEMPERATURE, Pruning
from terrazzo.errors import InputError
from terrazzo.openmmlab import Classifier
from terrazzo.openmmlab.config import load_config
from terrazzo.openmmlab.token_budget import cost

BACKBONE = dict(name="asvit_deit_tiny", num_classes=5, embed_dim=96, depth=4, blocks=(2, 3), patch_size=8, grid=(4, 4))
LV = dict(name="asvit_lvvit_small", num_classes=5, embed_dim=48, num_heads=3, depth=4, blocks=(2, 3), grid=(2, 2))


def built(backbone, **changes):
    options = {**backbone, **changes}
    return timm.create_model(options.pop("name"), **options)


@pytest.fixture
def file(tmp_path):
    """A function from a model's options to a file of weights without zeros, so that scores differ."""

    def write(backbone, **changes):
        torch.manual_seed(0)
        model = built(backbone, **changes)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "thresholds" not in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        torch.save({"state_dict": {f"backbone.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "vit.pth")
        return str(tmp_path / "vit.pth")

    return write


def images(side, batch=3):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def classifier(backbone, checkpoint, **recipe):
    recipe = dict(type="TokenBudget", budget=0.65, **recipe)
    model = Classifier(dict(backbone, checkpoint=checkpoint), loss=dict(type="CrossEntropyLoss"), recipe=recipe)
    if model.recipe.teacher is not None:
        model.recipe.teacher.double()
    return model.double().train()


def between(model, x):
    """Put thresholds between scores of the batch, so that each stage drops some tokens."""
    with torch.no_grad():
        tokens, state = model.begin(x)
        for block in model.blocks:
            if state.depth in model.reducer.blocks:
                scores = state.score[:, 1:].flatten().sort().values
                stage = model.reducer.blocks.index(state.depth)
                at = len(scores) // 3 if stage == 0 else len(scores) // 2
                model.reducer.thresholds[stage].fill_((scores[at] + scores[at + 1]) / 2)
            tokens = model.run_unit(block, tokens, state)


LABELS = torch.tensor([1, 0, 4])


class TestCost:
    @pytest.mark.parametrize(
        ("name", "wanted"),
        [
            ("asvit_deit_tiny", 1.24637),
            ("asvit_deit_small", 4.57364),
            ("asvit_lvvit_small", 6.51892),
            ("asvit_lvvit_medium", 12.63587),
        ],
    )
    def test_the_authors_constants(self, name, wanted):
        """The costs of the full network at 224 x 224 equal the authors' constants to five digits."""
        model = timm.create_model(name, device="meta")
        assert round(cost(model, (14, 14), [196] * len(model.blocks)), 5) == wanted

    def test_by_hand(self):
        """The cost of a block of 4 channels on 3 tokens, with patches of 2 x 2 pixels and one channel."""
        model = built(BACKBONE, embed_dim=4, num_heads=1, depth=1, blocks=(), patch_size=2, in_chans=1)
        assert cost(model, (2, 3), [3]) == pytest.approx((6 * 4 * 4 + 12 * 16 * 3 + 2 * 4 * 9) / 1e9, rel=1e-12)

    def test_of_each_image(self):
        model = built(BACKBONE)
        found = cost(model, (4, 4), [17, 17, torch.tensor([17.0, 3.0]), torch.tensor([17.0, 1.0])])
        alone = [cost(model, (4, 4), [17, 17, *rest]) for rest in ((17, 17), (3, 1))]
        torch.testing.assert_close(found, torch.tensor(alone))


@pytest.mark.parametrize("backbone", [BACKBONE, LV], ids=["deit", "lvvit"])
def test_losses_by_hand(backbone, file):
    """The losses are cross-entropy, the budget of the mean cost, and both divergences, summed class by class."""
    side = 32
    model, x = classifier(backbone, file(backbone), weight=7.0, distillation=0.3), images(side)
    between(model.backbone, x)
    model.eval()  # for batch norms; tokens stay masked, because a gradient is needed
    losses = model(x, LABELS, mode="loss")
    student, teacher = copy.deepcopy(model.backbone), model.recipe.teacher
    with torch.no_grad():
        student.reducer.form = "masked"
        tokens, state = student.begin(x)
        keeps = []
        for block in student.blocks:
            tokens = student.run_unit(block, tokens, state)
            keeps.append(torch.ones(3, tokens.shape[1]) if state.keep is None else state.keep)
        assert 0 < keeps[-1][:, 1:].sum() < keeps[2][:, 1:].sum() < keeps[0][:, 1:].sum()
        tokens = student.norm(tokens)
        logits = student.head.fc(tokens[:, 0])
        full = teacher.norm(teacher.forward_intermediates(x, intermediates_only=True)[-1].permute(0, 2, 3, 1))
        wanted = teacher.head.fc(teacher.forward_features(x)[:, 0])
    patches = keeps[0].shape[1] - 1
    costs = [cost(student, state.grid, [int(keep[i].sum()) for keep in keeps]) for i in range(3)]
    whole = cost(student, state.grid, [patches] * 4)
    assert losses["loss_budget"].item() == pytest.approx(7.0 * abs(sum(costs) / 3 - 0.65 * whole), rel=1e-9)
    assert losses["cost"].item() == pytest.approx(sum(costs) / 3 / whole, rel=1e-9)
    for i, block in enumerate((2, 3)):
        assert losses[f"kept{i}"].item() == pytest.approx((keeps[block].sum().item() - 3) / 3 / patches)

    def kl(student, teacher):
        p, q = teacher.softmax(-1), student.softmax(-1)
        return sum((p[c] * (p[c] / q[c]).log()).item() for c in range(5))

    by_hand = sum(kl(logits[i], wanted[i]) for i in range(3)) / 3
    assert losses["loss_distill"].item() == pytest.approx(0.3 * by_hand, rel=1e-6)
    probabilities = logits.softmax(1)[range(3), LABELS]
    assert losses["loss_cls"].item() == pytest.approx(-probabilities.log().mean().item(), rel=1e-9)
    if backbone is BACKBONE:
        assert "loss_patches" not in losses
        return
    kept = [(i, j) for i in range(3) for j in range(patches) if keeps[-1][i, j + 1] > 0.5]
    assert 0 < len(kept) < 3 * patches
    own, theirs = student.head.aux(tokens[:, 1:]), teacher.head.aux(full.flatten(1, 2))
    by_hand = sum(kl(own[i, j], theirs[i, j]) for i, j in kept) / len(kept)
    assert losses["loss_patches"].item() == pytest.approx(0.3 * by_hand, rel=1e-6)


def test_the_thresholds_gradient(file, monkeypatch):
    """dL/dtheta = -sum_j dL/dpi_j sigma'((S_j - theta) / tau) / tau, with dL/dpi_j by finite differences of the loss.

    A token whose mask is 0 counts, too: through the attention that it would get, and through its cost.
    """
    backbone = dict(BACKBONE, depth=3, blocks=(2,), grid=(2, 2))
    model, x = classifier(backbone, file(backbone), weight=500.0), images(16, batch=2)
    pruning = model.backbone.reducer
    tokens, state = model.backbone.begin(x)
    for block in model.backbone.blocks[:2]:
        tokens = model.backbone.run_unit(block, tokens, state)
    score = state.score.detach()
    with torch.no_grad():
        pruning.thresholds[0].fill_(score[:, 1:].flatten().sort().values[2] + 0.3 * TEMPERATURE)

    def total():
        losses = model(x, LABELS[:2], mode="loss")
        return sum(value for key, value in losses.items() if "loss" in key)

    (found,) = torch.autograd.grad(total(), [pruning.thresholds[0]])[0]  # of shape (1,)
    above = (score - pruning.thresholds[0].detach()) / TEMPERATURE
    hard = (above > 0).double()
    hard[:, 0] = 1
    assert 0 < hard[:, 1:].sum() < 8
    masks = [hard]

    def masked(self, x, state, stage):
        state.keep, state.full = masks[0], x
        return x

    monkeypatch.setattr(Pruning, "_masked", masked)
    step, wanted, slope = 1e-6, 0.0, above.sigmoid() * (1 - above.sigmoid()) / TEMPERATURE
    with torch.no_grad():
        for i in range(2):
            for j in range(1, 5):
                ends = []
                for sign in (1, -1):
                    masks[0] = hard.clone()
                    masks[0][i, j] += sign * step
                    ends.append(total())
                wanted -= (ends[0] - ends[1]) / (2 * step) * slope[i, j]
    assert wanted.abs() > 1
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_costs_move_thresholds(file):
    """If the cost is above the budget, the gradient raises thresholds; if it is below, the gradient lowers them."""
    model, x = classifier(BACKBONE, file(BACKBONE)), images(32)
    between(model.backbone, x)
    with torch.no_grad():  # where the steep sigmoid has a slope
        model.backbone.reducer.thresholds[0].add_(-TEMPERATURE)
    for budget, sign in ((0.1, -1), (1.0, 1)):
        model.recipe.budget = budget
        (grad,) = torch.autograd.grad(
            model(x, LABELS, mode="loss")["loss_budget"], [model.backbone.reducer.thresholds[0]]
        )
        assert grad.sign() == sign


def test_every_parameter_learns(file):
    for backbone in (BACKBONE, LV):
        model, x = classifier(backbone, file(backbone)), images(32)
        between(model.backbone, x)
        sum(value for key, value in model(x, LABELS, mode="loss").items() if "loss" in key).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_overlapping_forwards_keep_apart(file):
    """Nothing is kept between forward passes: two batches at once have the losses of each batch alone."""
    model = classifier(BACKBONE, file(BACKBONE))
    first, second = images(32), images(32).flip(0) * 1.5
    between(model.backbone, first)
    alone = [model(x, LABELS, mode="loss")["loss_budget"] for x in (first, second)]
    assert alone[0] != alone[1]
    names = {name for module in model.modules() for name in vars(module)}
    run, seen = model.backbone.run_unit, []

    def nested(unit, x, state):
        if state.depth == 3 and not seen:
            seen.append(None)
            seen.append(model(second, LABELS, mode="loss")["loss_budget"])
        return run(unit, x, state)

    model.backbone.run_unit = nested
    assert model(first, LABELS, mode="loss")["loss_budget"] == alone[0]
    assert seen[1] == alone[1]
    del model.backbone.run_unit
    assert {name for module in model.modules() for name in vars(module)} == names


class TestTeacher:
    def test_it_is_the_unpruned_network(self, file):
        """The teacher is frozen, stays in evaluation mode, and is in no checkpoint."""
        path = file(BACKBONE)
        model, x = classifier(dict(BACKBONE, drop_path_rate=0.5), path), images(32)
        between(model.backbone, x)
        teacher = model.recipe.teacher
        assert not teacher.training
        assert not any(p.requires_grad for p in teacher.parameters())
        deit = timm.create_model(
            "deit_tiny_patch16_224", num_classes=5, embed_dim=96, num_heads=3, depth=4, patch_size=8, img_size=32
        )
        names = {"stem.patches.": "patch_embed.proj.", "stem.": "", "head.fc.": "head."}
        state = {}
        for name, value in built(BACKBONE).state_dict().items():
            value = torch.load(path)["state_dict"][f"backbone.{name}"]
            prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
            state[names.get(prefix, "") + name[len(prefix) :]] = value
        deit.load_state_dict({name: value for name, value in state.items() if "thresholds" not in name})
        with torch.no_grad():
            torch.testing.assert_close(teacher(x), deit.double().eval()(x))
            assert not torch.allclose(teacher(x), model.eval()(x), atol=1e-3)
        assert model.state_dict().keys() == {f"backbone.{name}" for name in built(BACKBONE).state_dict()}
        before = copy.deepcopy(teacher.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()(x, LABELS, mode="loss")["loss_cls"].backward()
        optimizer.step()
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())

    def test_a_file_of_its_own(self, file, tmp_path):
        path = file(BACKBONE)
        model = Classifier(BACKBONE, recipe=dict(type="TokenBudget", budget=0.5, teacher=path))
        saved = torch.load(path)["state_dict"]["backbone.norm.weight"]
        assert torch.equal(model.recipe.teacher.norm.weight, saved)
        assert not torch.equal(model.backbone.norm.weight, saved)

    def test_pretrained_weights(self, file, tmp_path):
        state = {k.removeprefix("backbone."): v for k, v in torch.load(file(BACKBONE))["state_dict"].items()}
        torch.save(state, tmp_path / "pretrained.pth")
        overlay = dict(file=str(tmp_path / "pretrained.pth"), num_classes=5)
        options = dict(BACKBONE, pretrained=True, pretrained_cfg_overlay=overlay)
        model = Classifier(options, recipe=dict(type="TokenBudget", budget=0.5))
        assert torch.equal(model.recipe.teacher.norm.weight, state["norm.weight"])
        other = dict(options, num_classes=7)
        with pytest.raises(InputError, match="no weights of 'asvit_deit_tiny' with 7 classes are named"):
            Classifier(other, recipe=dict(type="TokenBudget", budget=0.5))

    def test_none(self, file):
        model = Classifier(BACKBONE, recipe=dict(type="TokenBudget", budget=0.5, distillation=0))
        assert model.recipe.teacher is None
        assert model(images(32).float(), LABELS, mode="loss").keys() == {
            *("loss_cls", "loss_budget", "cost", "kept0", "kept1")
        }

    def test_weights_of_other_classes(self, file):
        """A student loads them without the classifier; a teacher is refused, because it needs the classifier."""
        path = file(BACKBONE)
        assert isinstance(Classifier(dict(BACKBONE, num_classes=7, checkpoint=path)).backbone.head.fc, nn.Linear)
        with pytest.raises(InputError, match="has in another shape 2, such as"):
            Classifier(dict(BACKBONE, num_classes=7, checkpoint=path), recipe=dict(type="TokenBudget", budget=0.5))


@pytest.mark.parametrize(
    ("backbone", "arguments", "message"),
    [
        (BACKBONE, dict(budget=0.5), "set backbone.checkpoint or recipe.teacher to a file"),
        (BACKBONE, dict(budget=0.0), "budget must be above 0 and at most 1, got 0.0"),
        (dict(BACKBONE, form="packed"), dict(budget=0.5), "the model is ASViT of form 'packed'"),
        (dict(name="resnet18", num_classes=5), dict(budget=0.5), "the model is ResNet"),
    ],
)
def test_errors(backbone, arguments, message):
    with pytest.raises(InputError, match=message):
        Classifier(backbone, recipe=dict(type="TokenBudget", **arguments))


@pytest.mark.parametrize("name", ["asvit-deit-small_4xb128-30e_imagenet", "asvit-deit-tiny_1xb64-30e_eurosat64"])
def test_thresholds_take_no_weight_decay(name, tiny_config):
    cfg = tiny_config(name)
    with torch.device("meta"):
        model = Classifier({key: value for key, value in cfg.model.backbone.items() if key != "checkpoint"})
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    decay = {id(p): group["weight_decay"] for group in wrapper.optimizer.param_groups for p in group["params"]}
    assert {decay[id(p)] for p in model.backbone.reducer.thresholds} == {0.0}
    assert decay[id(model.backbone.blocks[0].mlp.fc1.weight)] > 0
    assert not (load_config(name).optim_wrapper.get("clip_grad"))
