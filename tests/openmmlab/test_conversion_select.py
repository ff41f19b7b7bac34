"""The stage "select": two branches in each layer, the schedules, the end of a training, and the student it leaves."""

import copy

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from support.teachers import teacher_file

from terrazzo.errors import InputError
from terrazzo.openmmlab import AttentionConversion, TerrazzoBackbone
from terrazzo.openmmlab.config import build_runner, load_config, packaged_configs
from terrazzo.openmmlab.conversion.selection import SHARE, count_error, doubt, schedule
from terrazzo.openmmlab.conversion.stages import make_stage

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5)
NAME = "vit_tiny_patch16_224"
SMALL_MAPS = {key: value for key, value in SMALL.items() if key != "num_classes"}
STAGE = dict(type="select", target=2)
ADAPTERS = dict(type="distil", trained="adapters", rank=4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return teacher_file(tmp_path_factory.mktemp("teacher"), NAME, 12, **SMALL)


@pytest.fixture
def make(weights):
    def made(stage=STAGE, mixer="hedgehog", layers="all"):
        torch.manual_seed(1)
        teacher = dict(name=NAME, checkpoint=weights, **SMALL)
        return AttentionConversion(teacher, dict(mixer=mixer, layers=layers), stage).train()

    return made


def batch(count=2):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def set_shares(model, *values):
    for layer, value in zip(model.layers, values):
        getattr(model.backbone.blocks[layer].attn, SHARE).data.fill_(value)


def test_schedules():
    assert schedule(0) == pytest.approx((10, 0.1))
    assert schedule(0.125) == pytest.approx((5.5, 0.2))
    assert schedule(0.25) == pytest.approx((1, 0.3))
    assert schedule(0.5) == pytest.approx((1, 0.5))
    assert schedule(1) == pytest.approx((1, 0.5))


def test_terms_have_the_gradients_of_the_formula():
    shares = torch.tensor([0.6, 0.3, 0.9, 0.5], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(count_error(shares, 3), shares)
    assert count_error(shares, 3).item() == (2 - 3) ** 2  # 0.3 and 0.5 round to 0
    torch.testing.assert_close(grad, torch.full_like(shares, -2.0 * (2 - 3)))
    assert doubt(shares, 2).item() == pytest.approx(4 - (0.2**2 + 0.4**2 + 0.8**2))
    for power in (10.0, 1.0):
        (grad,) = torch.autograd.grad(doubt(shares, power), shares)
        slope = -2 * power * (2 * shares - 1).abs() ** (power - 1) * (2 * shares - 1).sign()
        torch.testing.assert_close(grad, slope.detach())


def test_both_branches_run_and_shares_mix_them(make):
    model, x = make(), batch()
    with torch.no_grad():
        set_shares(model, 1.0, 1.0, 1.0, 1.0)
        torch.testing.assert_close(model.backbone(x), model.teacher(x))
        plain = make("hidden")
        plain.backbone.load_state_dict(model.backbone.state_dict(), strict=False)
        set_shares(model, 0.0, 0.0, 0.0, 0.0)
        torch.testing.assert_close(model.backbone(x), plain.backbone(x))
        set_shares(model, 0.3, 0.0, 0.0, 0.0)
        tokens = model.backbone.blocks[0].norm1(model.backbone._begin(x, maps=False)[0])
        own, softmax = plain.backbone.blocks[0].attn(tokens), model.teacher.blocks[0].attn(tokens)
        torch.testing.assert_close(model.backbone.blocks[0].attn(tokens), 0.3 * softmax + 0.7 * own)


def test_it_trains_shares_and_mixers_and_keeps_shares_in_range(make):
    model = make()
    for layer in model.layers:  # the mixers differ from the teacher's layers
        model.backbone.blocks[layer].attn.mixer.query_map.data.normal_()
    set_shares(model, 1.5, -0.5, 0.5, 0.6)
    terms = model(batch(), torch.zeros(2, dtype=torch.long), mode="loss")
    assert {name for name in terms if "loss" in name} == {"loss_kl", "loss_tokens", "loss_count", "loss_doubt"}
    assert [float(terms[f"share{i}"]) for i in range(4)] == pytest.approx([1.0, 0.0, 0.5, 0.6])
    sum(value for name, value in terms.items() if "loss" in name).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".attn." in name), name
        assert not parameter.requires_grad or parameter.grad is not None, name
        if SHARE in name:
            assert parameter.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in model.teacher.parameters())


def test_it_trains_in_bfloat16(make):
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        terms = model(batch(), mode="loss")
    sum(value for name, value in terms.items() if "loss" in name).backward()
    grads = [getattr(model.backbone.blocks[layer].attn, SHARE).grad for layer in model.layers]
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def test_in_evaluation_layers_have_one_branch(make):
    model, x = make(), batch()
    set_shares(model, 0.7, 0.2, 0.8, 0.3)
    assert model.stage.chosen(model) == (1, 3)
    model.eval()
    student = model.stage.finished(model)
    assert student.conversion == {1: dict(mixer="hedgehog"), 3: dict(mixer="hedgehog")}
    with torch.no_grad():
        torch.testing.assert_close(student(x), model.backbone(x))
        # The student of the end is the teacher, but for its converted layers.
        assert not any(SHARE in name for name in student.state_dict())
        for name, value in model.teacher.state_dict().items():
            assert torch.equal(student.state_dict()[name], value), name
        assert not torch.equal(student(x), model.teacher(x))
        samples = model(x, mode="predict")
    assert samples[0]["errors"]["error0"] < 1e-5 < samples[0]["errors"]["error1"]


def test_softmax_layers_of_the_student_are_the_teachers(make):
    """The stage "hidden" trains projections; a layer that gets softmax attention back gets the teacher's."""
    model = make()
    for layer in model.layers:
        model.backbone.blocks[layer].attn.qkv.weight.data.add_(0.1)
    set_shares(model, 0.1, 0.2, 0.8, 0.9)
    student = model.stage.finished(model)
    own, wanted = (m.blocks[2].attn.qkv.weight for m in (student, model.teacher))
    assert torch.equal(own, wanted)
    assert torch.equal(student.blocks[0].attn.qkv.weight, model.backbone.blocks[0].attn.qkv.weight)
    assert model.backbone.conversion.keys() == {0, 1, 2, 3}  # the model that trains stays as it is


def test_a_copy_has_shares_of_its_own(make):
    model = make()
    twin = copy.deepcopy(model)
    set_shares(twin, 0.1, 0.2, 0.8, 0.9)
    assert (model.stage.chosen(model), twin.stage.chosen(twin)) == ((0, 1), (0, 1))
    set_shares(model, 0.9, 0.8, 0.2, 0.1)
    x = batch()
    with torch.no_grad():
        twin.eval(), model.eval()
        torch.testing.assert_close(twin.backbone(x), twin.stage.finished(twin)(x))
        assert not torch.equal(twin.backbone(x), model.backbone(x))


@pytest.mark.parametrize(
    ("shares", "progress", "done"),
    [
        ((0.1, 0.19, 0.81, 0.9), 0.5, True),
        ((0.1, 0.19, 0.81, 0.9), 0.49, False),
        ((0.1, 0.21, 0.81, 0.9), 0.7, False),
        ((0.1, 0.1, 0.1, 0.9), 0.7, False),
    ],
)
def test_it_is_done_when_shares_are_sure_and_as_many_as_wanted(make, shares, progress, done):
    model = make()
    set_shares(model, *shares)
    assert model.stage.done(model, progress) is done


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (dict(type="select"), "target"),
        (dict(type="select", target=4), "from 1 to 3 of the 4"),
        (dict(type="select", target=0), "from 1 to 3 of the 4"),
        (dict(type="select", target=2, trained="all"), "leave out trained"),
    ],
)
def test_bad_options(make, stage, words):
    with pytest.raises(InputError, match=words):
        make(stage)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    random, root = np.random.default_rng(0), tmp_path_factory.mktemp("pictures")
    for i in range(6):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(root / f"{i}.png")
    return root


@pytest.fixture
def run(weights, pictures, tmp_path):
    """Train in a folder of its own with the real runner, and return the runner."""

    def ran(name, stage=STAGE, steps=8, rate=0.1, **more):
        optimizer = dict(type="AdamW", lr=1e-2, weight_decay=0.0)
        shares = {SHARE: dict(lr_mult=rate / 1e-2)}
        cfg = dict(
            default_scope="mmengine",
            model=dict(
                type="AttentionConversion",
                teacher=dict(name=NAME, checkpoint=weights, **SMALL),
                convert=dict(mixer="hedgehog"),
                stage=stage,
            ),
            train_dataloader=dict(
                batch_size=2,
                num_workers=0,
                drop_last=True,
                sampler=dict(type="InfiniteSampler", shuffle=True),
                collate_fn=dict(type="default_collate"),
                dataset=dict(type="Pictures", data_root=str(pictures), transform=dict(input_size=32)),
            ),
            train_cfg=dict(type="IterBasedTrainLoop", max_iters=steps),
            optim_wrapper=dict(type="OptimWrapper", optimizer=optimizer, paramwise_cfg=dict(custom_keys=shares)),
            param_scheduler=[dict(type="CosineAnnealingLR", eta_min_ratio=0.1, by_epoch=False, end=steps // 2)],
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=max(3, steps // 3))),
            custom_hooks=[dict(type="StudentHook")],
            log_processor=dict(by_epoch=False),
        )
        runner = build_runner(Config({**cfg, **more}), tmp_path / name, seed=0, resume=more.pop("resume", False))
        runner.train()
        return runner

    return ran


@pytest.mark.long
@pytest.mark.parametrize("stage", [STAGE, ADAPTERS], ids=lambda stage: stage["type"])
def test_a_resumed_training_continues_exactly(run, weights, tmp_path, stage):
    """Also in the stage "distil" with adapters, which a resumed training keeps."""
    if stage is ADAPTERS:
        pytest.importorskip("peft", reason="needs the extra 'conversion'")
    whole = run("whole", stage)
    half = run("half", stage, resume=str(tmp_path / "whole" / "iter_3.pth"))
    assert whole.iter == half.iter == 8
    early = torch.load(tmp_path / "whole" / "iter_3.pth", weights_only=True)["state_dict"]
    assert any("softmax_share" in name or "lora_" in name for name in early)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, half.model.state_dict()[name]), name
        if "softmax_share" in name or "lora_" in name:
            assert not torch.equal(value, early[name]), name
    students = [torch.load(tmp_path / name / "student.pth", weights_only=True) for name in ("whole", "half")]
    assert students[0]["meta"] == students[1]["meta"]
    plain = AttentionConversion(dict(name=NAME, checkpoint=weights, **SMALL), str(tmp_path / "half" / "student.pth"))
    assert list(plain.state_dict()) == list(students[0]["state_dict"])


@pytest.mark.long
def test_it_ends_early_and_the_next_stage_and_a_backbone_take_the_student(run, weights, tmp_path):
    runner = run("early", steps=40, rate=0.4)
    assert 20 <= runner.iter < 40
    model, file = runner.model, str(tmp_path / "early" / "student.pth")
    assert model.stage.done(model, 1.0)
    chosen = list(model.stage.chosen(model))
    assert len(chosen) == 2
    backbone = TerrazzoBackbone(
        NAME, checkpoint=file, convert=dict(mixer="hedgehog", layers=chosen), out_indices=(3,), **SMALL_MAPS
    ).eval()
    with torch.no_grad():
        wanted = model.eval().backbone.forward_intermediates(batch(), indices=[3], intermediates_only=True)
        torch.testing.assert_close(backbone(batch())[0], wanted[0])
    next_model = AttentionConversion(dict(name=NAME, checkpoint=weights, **SMALL), convert=file, stage="distil")
    assert list(next_model.layers) == chosen
    state = torch.load(file, weights_only=True)["state_dict"]
    assert next_model.load_state_dict(state, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(next_model.backbone(batch()), model.backbone(batch()))
    again = run("early", steps=40, rate=0.4, resume=True)  # of a training that had ended
    assert again.iter <= runner.iter
    assert list(again.model.stage.chosen(again.model)) == chosen
    with pytest.raises(InputError, match="no record of mixers"):
        AttentionConversion(dict(name=NAME, checkpoint=weights, **SMALL), convert=weights)


@pytest.mark.parametrize("name", [name for name in packaged_configs() if name.startswith("convert-select")])
def test_configs(name):
    """Schedules take half of the training, and mmengine's settings reach what the stage trains."""
    cfg = load_config(name)
    assert make_stage(cfg.model.stage).target == 6
    (schedule,) = cfg.param_scheduler if isinstance(cfg.param_scheduler, list) else [cfg.param_scheduler]
    assert (schedule["end"], schedule["eta_min_ratio"]) == (cfg.train_cfg.max_iters // 2, 0.1)
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys[SHARE] == dict(lr_mult=30.0, decay_mult=0.0)
    assert dict(type="StudentHook") in cfg.custom_hooks
