"""A user's mistakes are refused with one line before a run starts, and make no work dir."""

import json
import math
import shutil
import time

import numpy as np
import pytest
import torch

from terrazzo.tools.training.evaluation import plain_metric, without_nan

CONFIG = "fpn_dinat-mini_floors"
TINY = (
    *("model.backbone.name=resnet10t", "model.backbone.out_indices=(1, 2, 3, 4)"),
    *("train_dataloader.batch_size=2", "crop_size=(64, 64)"),
)
BEST = "default_hooks.checkpoint.save_best"


def hook(name, **arguments):
    return f"custom_hooks={[dict(type=name, **arguments)]!r}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["optim_wraper.lr=1"], "did you mean optim_wrapper?"),
        (["train_dataloader.batchsize=2"], "'batchsize'; did you mean batch_size"),
        (["train_dataloader.batch_size=two"], "options say train_dataloader.batch_size=two"),
        (["train_dataloader.num_workers=-1"], "options say train_dataloader.num_workers=-1"),
        (["val_dataloader.batch_size=0"], "the val_dataloader of"),
        (["train_dataloader.sampler.type=Infinite"], "did you mean InfiniteSampler"),
        (["train_dataloader=None"], "has no train_dataloader"),
        (["train_cfg.max_iters=abc"], "options say train_cfg.max_iters=abc"),
        (["train_cfg.val_interval=abc", "--max-iters", "2"], "options say train_cfg.val_interval=abc"),
        (["train_cfg.max_iter=3"], "did you mean max_iters"),
        (["train_cfg.type=IterBasedLoop"], "did you mean IterBasedTrainLoop"),
        (["optim_wrapper.optimizer.lr=abc"], "options say optim_wrapper.optimizer.lr=abc"),
        (["optim_wrapper.optimizer.type=AdamX"], "did you mean Adam"),
        (["optim_wrapper.optimiser.lr=1"], "optim_wrapper"),
        (["optim_wrapper.clip_grad.max_nrm=1"], "'max_nrm'; did you mean max_norm"),
        (["param_scheduler.0.type=LinearLr"], "did you mean LinearLR"),
        (["default_hooks.checkpoint.type=ChekpointHook"], "did you mean CheckpointHook"),
        (["default_hooks.checkpoint.intervall=1"], "no argument 'intervall'; did you mean interval?"),
        (["default_hooks.logger.intervall=1"], "did you mean interval"),
        ([hook("EMAHok")], "did you mean EMAHook"),
        (["train_pipeline.3.type=RandomFlop"], "did you mean RandomFlip"),
        (["train_pipeline.3.prob=abc"], "options say train_pipeline.3.prob=abc"),
        (["train_pipeline.2.crop_size=(0,5)"], "train_dataloader of"),
        (["val_evaluator.type=IoUMetrik"], "did you mean IoUMetric"),
        (["val_evaluator.iou_metrics=[mIoX]"], "choose from mIoU, mDice, mFscore"),
        (["val_evaluator.format_only=True"], "set val_evaluator.output_dir"),
        ([f"{BEST}=mDice"], "the validation gives aAcc, mAcc, mIoU"),
        (["val_evaluator.iou_metrics=[mDice]", f"{BEST}=mIoU"], "gives aAcc, mAcc, mDice"),
        ([f"{BEST}=[mIoU,mIou]", "default_hooks.checkpoint.rule=greater"], "did you mean mIoU?"),
        ([hook("EarlyStoppingHook", monitor="mIoUs")], "monitor of EarlyStoppingHook is 'mIoUs'"),
        (["param_scheduler=[{'type':'ReduceOnPlateauLR','monitor':'top1'}]"], "is 'top1'"),
        (["visualizer.vis_backends=[{'type':'ClearMLVisBackend'}]"], "pip install clearml"),
        (["visualizer.type=Painter"], "the visualizer of"),
        (["randomness.sed=1"], "did you mean seed"),
        (["runner_type=Runer"], "runner_type 'Runer' is unknown"),
        (["launcher=foo"], "launcher 'foo' is unknown"),
        (["log_level=LOUD"], "options say log_level=LOUD"),
        (["load_from=none.pth"], "checkpoint 'none.pth' does not exist"),
        (["model.test_cfg.mode=slide"], "crop_size is None"),
        (["model.decode_head.num_clases=6"], "did you mean num_classes"),
    ],
)
def test_training_is_refused_before_it_starts(refused, floors, tmp_path, options, words):
    work = tmp_path / "runs" / "work"
    assert words in refused("train", CONFIG, "--data-root", floors, "--work-dir", work, *TINY, *options)
    assert not work.parent.exists()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("optim_wraper.lr=1", "did you mean optim_wrapper?"),
        ("test_dataloader.batchsize=2", "the test_dataloader of"),
        ("test_evaluator.format_only=True", "set test_evaluator.output_dir"),
        ("test_evaluator.iou_metrics=[mIoX]", "choose from mIoU"),
        ("model.test_cfg.mode=slide", "crop_size is None"),
        ("model.neck.type=FPM", "did you mean"),
    ],
)
def test_a_test_is_refused_likewise(refused, trained, option, words):
    assert words in refused("test", *trained, option)


@pytest.mark.parametrize(("verb", "more"), [("export", ["--size", 64, 64]), ("compare", ["--backbone", "resnet10t"])])
def test_other_verbs_refuse_the_same_options(refused, trained, tmp_path, verb, more):
    place = [trained[1]] if verb == "export" else []
    out = tmp_path / ("out.onnx" if verb == "export" else "out")
    assert "did you mean optim_wrapper" in refused(verb, trained[0], *place, *more, "--out", out, "optim_wraper.lr=1")
    assert not out.exists()


@pytest.fixture(scope="module")
def used(run, floors, tmp_path_factory):
    """A work dir with a checkpoint after one iteration."""
    work = tmp_path_factory.mktemp("used") / "work"
    result = run("train", CONFIG, "--data-root", floors, "--work-dir", work, "--max-iters", 1, *TINY)
    assert result.exit_code == 0, result.output
    time.sleep(1)  # mmengine names a log's folder by its second
    return work


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["model.decode_head.channels=32"], "decode_head.conv_seg.weight is 6x64x1x1 there and 6x32x1x1 in the config"),
        (["model.backbone.name=resnet14t"], "has another model: backbone."),
        (
            ["optim_wrapper.optimizer={'_delete_':True,'type':'SGD','lr':0.1,'momentum':0.9}"],
            "AdamW; the config has SGD",
        ),
        (["optim_wrapper.optimizer.type=Adam"], "AdamW; the config has Adam"),
        (["optim_wrapper.paramwise_cfg={'norm_decay_mult':0.0}"], "1 group of"),
        (["optim_wrapper.optimizer.type=AdamX"], "did you mean Adam"),
    ],
)
def test_resuming_another_run_leaves_its_work_dir_as_it_was(refused, floors, used, options, words):
    before = contents(used)
    arguments = ("--data-root", floors, "--work-dir", used, "--max-iters", 2, "--resume", *TINY, *options)
    assert words in refused("train", CONFIG, *arguments)
    assert contents(used) == before


@pytest.mark.long
def test_a_used_work_dir_is_noted(run, floors, used, tmp_path):
    copy = shutil.copytree(used, tmp_path / "work")
    result = run("train", CONFIG, "--data-root", floors, "--work-dir", copy, "--max-iters", 1, *TINY)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("note: ")
    assert "holds 1 checkpoint of an earlier run" in result.stderr
    compile((copy / f"{CONFIG}.py").read_text(), "the config that was written", "exec")


def test_a_test_that_only_writes_predictions_says_where(run, trained, tmp_path):
    out = tmp_path / "written"
    options = ("test_evaluator.format_only=True", f"test_evaluator.output_dir={out}")
    result = run("test", *trained, *options, "--out", tmp_path / "metrics.json")
    assert result.exit_code == 0, result.output
    assert f"its predictions are in {out}, and it computes no metric" in result.stdout
    assert len(list(out.glob("*.png"))) == 3
    assert set(json.loads((tmp_path / "metrics.json").read_text())) == {"config", "checkpoint"}


def test_a_detector_that_finds_nothing_is_said_to(monkeypatch, run, trained):
    """A test may have empty metrics; CocoMetric's are empty if no box is found."""
    monkeypatch.setattr("mmseg.evaluation.metrics.IoUMetric.compute_metrics", lambda self, results: {})
    result = run("test", *trained)
    assert result.exit_code == 0, result.output
    assert "found nothing in the 3 pictures" in result.stdout
    assert "metric  value" not in result.stdout


def test_metrics_that_are_no_numbers(monkeypatch, run, trained, tmp_path):
    values = {"a": math.nan, "b": "text", "c": None, "d": np.ones(2), "e": torch.tensor(1.23456), "f": math.inf}
    monkeypatch.setattr("mmseg.evaluation.metrics.IoUMetric.compute_metrics", lambda self, results: values)
    result = run("test", *trained, "--out", tmp_path / "metrics.json")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "metrics.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    found = json.loads(text)
    assert [found[name] for name in "abcdef"] == [None, "text", None, [1.0, 1.0], 1.2346, None]


def test_plain_metrics():
    assert plain_metric({"x": [np.float32(0.25), np.int64(3)]}) == {"x": [0.25, 3.0]}
    assert plain_metric(object).startswith("<class")
    assert without_nan({"x": [math.nan, 1.0]}) == {"x": [None, 1.0]}


@pytest.mark.long
def test_an_unknown_metric_that_only_the_validation_shows(refused, monkeypatch, floors, tmp_path):
    """The keys of a user's metric are unknown in advance, so the first validation ends the run with one line."""
    from terrazzo.openmmlab import monitoring

    monkeypatch.delitem(monitoring._KEYS, "IoUMetric")
    places = ("--data-root", floors, "--work-dir", tmp_path / "work", "--max-iters", 1)
    options = (f"{BEST}=mystery", "default_hooks.checkpoint.rule=less")
    assert "the validation gave aAcc, mAcc, mIoU" in refused("train", CONFIG, *places, *TINY, *options)
