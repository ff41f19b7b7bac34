"""Conversions from their configs: stages that follow each other, resumed runs, averages, and several processes."""

import json
import math
import re

import numpy as np
import pytest
import timm
import torch
from mmengine.registry import MODELS
from support import distributed_worker
from support.processes import forks

import terrazzo
from terrazzo.backbones._hosts import record_of
from terrazzo.checkpoints.files import save_file
from terrazzo.checkpoints.records import meta_of
from terrazzo.openmmlab.config import build_runner, load_config, packaged_configs
from terrazzo.tools.training.curves import draw_curves, read_curves

CONFIGS = [name for name, path in packaged_configs().items() if path.parent.name == "conversion"]
TINY = dict(img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10)
MATRIX, HIDDEN, DISTIL = (
    f"convert-{stage}_vit-tiny-hedgehog_1xb64-{steps}_eurosat64"
    for stage, steps in (("matrix", 30), ("hidden", 90), ("distil", 60))
)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Settings that make the small experiment tiny, with a teacher's file."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224", **TINY).state_dict(), file)
    found = {f"model.teacher.{key}": value for key, value in TINY.items()} | {"model.teacher.checkpoint": str(file)}
    for loader in ("train", "val", "test"):
        found |= {f"{loader}_dataloader.num_workers": 0, f"{loader}_dataloader.persistent_workers": False}
    return found | {
        "train_dataloader.batch_size": 5,
        "train_cfg.max_iters": 4,
        "train_cfg.val_interval": 4,
        "default_hooks.checkpoint.interval": 2,
        "default_hooks.checkpoint.max_keep_ckpts": -1,
        "default_hooks.logger.interval": 1,
    }


@pytest.mark.long
def test_stages_follow_each_other(tiny_data, options, tmp_path):
    """Each stage starts from the file of the stage before; a resumed stage ends like an unbroken one."""
    root, before = tiny_data("eurosat64"), {}
    for name, stage in ((MATRIX, "matrix"), (HIDDEN, "hidden"), (DISTIL, "distil")):
        runner = build_runner(load_config(name, root, options | before), tmp_path / stage, seed=0)
        runner.train()
        assert math.isfinite(runner.message_hub.get_scalar("train/loss").current())
        logged = {key.removeprefix("val/") for key in runner.message_hub.log_scalars}
        assert {"teacher/agreement", "teacher/kl", "teacher/error", "teacher/front1", "accuracy/top1"} <= logged
        before = {"load_from": str(tmp_path / stage / "iter_4.pth")}
        saved = torch.load(before["load_from"], weights_only=True)
        assert saved["meta"]["terrazzo.changes"]["convert"][0]["mixer"] == "hedgehog"
        assert set(saved["state_dict"]) == set(runner.model.state_dict())
        curves = read_curves(tmp_path / stage)
        assert ("error1" in curves["train"]) == (stage != "distil")
        draw_curves(curves, "iteration", tmp_path / "curves.png")
    unbroken = runner.model.state_dict()
    again = load_config(DISTIL, root, options)
    runner = build_runner(again, tmp_path / "again", resume=str(tmp_path / "distil" / "iter_2.pth"), seed=0)
    runner.train()
    torch.testing.assert_close(runner.model.state_dict(), unbroken)
    backbone = dict(name="vit_tiny_patch16_224", checkpoint=before["load_from"], convert=dict(mixer="hedgehog"), **TINY)
    backbone.pop("num_classes")
    backbone = MODELS.build(dict(type="TerrazzoBackbone", out_indices=(1,), **backbone))
    assert torch.equal(backbone.model.blocks[1].attn.qkv.weight, unbroken["backbone.blocks.1.attn.qkv.weight"])


def test_a_plan_of_a_student_begins_a_training(tiny_data, options, tmp_path):
    """All layers learn, a plan keeps some, and the file of that model, with timm's names, begins the next stage."""
    root = tiny_data("eurosat64")
    cfg = load_config(HIDDEN, root, options)
    student = MODELS.build(cfg.model).backbone
    with torch.no_grad():
        for block in student.blocks:
            block.attn.mixer.query_map.mul_(0.5)
    plan = terrazzo.conversion_plan(student, "hedgehog", torch.randn(2, 3, *student.patch_embed.img_size), budget=1)
    (kept,) = plan.layers
    terrazzo.convert_attention(student, "hedgehog", layers=plan)
    file = tmp_path / "planned.pth"
    save_file({"state_dict": student.state_dict(), "meta": meta_of(record_of(student))}, file)
    chosen = options | {"load_from": str(file), "model.convert.layers": [kept], "train_cfg.max_iters": 1}
    runner = build_runner(load_config(DISTIL, root, chosen), tmp_path / "distil", seed=0)
    assert runner.model.layers == (kept,)
    runner.load_or_resume()
    for name, value in student.state_dict().items():
        assert torch.equal(runner.model.backbone.state_dict()[name], value), name


@pytest.mark.long
def test_pictures_without_labels_and_two_branches(tiny_data, options, tmp_path):
    """The configs of the large model run on folders of pictures; an average of the weights is kept in the last."""
    root, tiny = tiny_data("eurosat64"), dict(img_size=64, embed_dim=32, depth=2, num_heads=2)
    options = {key: value for key, value in options.items() if not key.startswith("model.")}
    torch.manual_seed(0)
    file = tmp_path / "teacher.pth"
    torch.save(timm.create_model("vit_small_patch14_dinov2", **tiny).state_dict(), file)
    options |= {f"model.teacher.{key}": value for key, value in tiny.items()} | {
        "model.teacher.checkpoint": str(file),
        "train_dataloader.dataset.folders": ["train", str(root / "test")],
        "train_dataloader.dataset.transform.input_size": 56,
        "val_dataloader.dataset.transform.input_size": 56,
        "train_cfg.max_iters": 2,
        "train_cfg.val_interval": 2,
    }
    for stage in ("global", "distil"):
        name = f"convert-{stage}_vit-small-dinov2-mate_1xb16-2k_unlabelled-224x224"
        runner = build_runner(load_config(name, root, options), tmp_path / stage, seed=0)
        assert len(runner.train_dataloader.dataset) == 20
        runner.train()
        assert math.isfinite(runner.message_hub.get_scalar("train/loss").current())
        options["load_from"] = str(tmp_path / stage / "iter_2.pth")


@pytest.fixture(scope="module")
def whole_teacher(tmp_path_factory):
    """A function from a teacher's settings to the same with a file of random weights, written once for each model."""
    folder = tmp_path_factory.mktemp("whole")

    def made(teacher):
        file = folder / f"{teacher['name']}.pth"
        teacher = {**teacher, "pretrained": False, "checkpoint": str(file)}
        settings = {key: value for key, value in teacher.items() if key not in ("name", "checkpoint")}
        if not file.exists():
            torch.save(timm.create_model(teacher["name"], **settings).state_dict(), file)
        return teacher

    return made


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("convert")])
def test_configs_build(name, whole_teacher):
    """Every config builds at full size, and trains what its stage trains."""
    if "adapters" in name:
        pytest.importorskip("peft", reason="needs the extra 'conversion'")
    cfg = load_config(name)
    model = MODELS.build(dict(cfg.model, teacher=whole_teacher(cfg.model.teacher)))
    assert model.layers == tuple(range(12))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert ("backbone.blocks.3.mlp.fc1.weight" in trained) == ("distil" in name)
    assert ("backbone.blocks.3.attn.proj.weight" in trained) == (
        re.match("convert-(hidden|select|adapters|distil)", name) is not None
    )
    assert any(".mixer." in name for name in trained)


@pytest.mark.slow  # three trainings, two of them of two processes
@pytest.mark.parametrize("name", [HIDDEN, DISTIL])
def test_two_processes_with_half_the_batch(name, tiny_data, options, tmp_path):
    """Two processes, and accumulated batches, give the losses of one process."""

    more = {"train_dataloader.sampler": dict(type="DefaultSampler", shuffle=True)}
    more |= {"train_cfg.max_iters": 2, "train_cfg.val_interval": 9, "train_dataloader.batch_size": 10}
    more |= {"train_dataloader.dataset.transform": dict(input_size=64), "param_scheduler": None}
    root, losses = tiny_data("eurosat64"), []
    for folder, options_of, arguments in (
        ("one", {}, {}),
        ("two", {"train_dataloader.batch_size": 5}, dict(launcher="pytorch")),
        ("many", {"train_dataloader.batch_size": 5, "train_cfg.max_iters": 4}, dict(accumulate=2)),
    ):
        work_dir = tmp_path / folder
        work_dir.mkdir()
        content = dict(config=name, root=str(root), work_dir=str(work_dir), options=options | more | options_of)
        content["arguments"] = dict(seed=4, **arguments)
        if arguments.get("launcher"):
            (work_dir / "settings.json").write_text(json.dumps(content))
            forks(work_dir / "settings.json", 2)
            found = [json.loads((work_dir / f"losses_{rank}.json").read_text()) for rank in range(2)]
            losses.append(np.mean(found, axis=0))
        else:
            losses.append(np.array(distributed_worker.train(**content)))
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(losses[2].reshape(-1, 2).mean(1), losses[0], rtol=0, atol=1e-4)


def test_records_of_configs(options, tmp_path):
    model = MODELS.build(load_config(HIDDEN, tmp_path, options).model)
    assert record_of(model)["convert"] == [{"mixer": "hedgehog", "options": {}, "layers": [0, 1]}]
