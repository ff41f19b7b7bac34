"""The pictures that a training leaves: curves, confusions, examples; and the logs of other tools."""

import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_data

from terrazzo.openmmlab.config import load_config
from terrazzo.tools import mm
from terrazzo.tools.training import confusion
from terrazzo.tools.training.curves import draw_curves, read_curves
from terrazzo.tools.training.report import ReportHook

CONFIG = "fpn_dinat-mini_floors"
TINY = (
    *("model.backbone.name=resnet10t", "model.backbone.out_indices=(1, 2, 3, 4)"),
    *("train_dataloader.batch_size=2", "model.data_preprocessor.size=(64, 64)", "default_hooks.logger.interval=1"),
)


@pytest.mark.long
def test_segmentation_and_resuming(run, floors, tmp_path):
    """A resumed run draws the curves of all its parts."""
    train = ("train", CONFIG, "--data-root", floors, "--work-dir", tmp_path, *TINY)
    for more in (("--max-iters", 1), ("--max-iters", 2, "--resume")):
        result = run(*train, *more)
        assert result.exit_code == 0, result.output
        assert f"pictures in {tmp_path}: curves.png, confusion.png, examples.png" in result.stdout
    curves = read_curves(tmp_path)
    assert [step for step, _ in curves["train"]["loss"]] == [1, 2]
    assert [step for step, _ in curves["val"]["mIoU"]] == [1, 2]
    assert Image.open(tmp_path / "curves.png").width > 1000
    sheet = Image.open(tmp_path / "examples.png")
    assert sheet.height > 3 * 320, "three floors to validate on"
    assert not list(tmp_path.glob(".partial*"))


@pytest.mark.long
def test_no_report_and_no_log(run, refused, floors, tmp_path, monkeypatch):
    train = ("train", CONFIG, "--data-root", floors, "--work-dir", tmp_path / "work", *TINY, "--max-iters", 1)
    with monkeypatch.context() as patch:
        patch.setattr("terrazzo.openmmlab.building.importlib.util.find_spec", lambda name: None)
        assert "pip install tensorboard" in refused(*train, "--log", "tensorboard")
        assert "pip install wandb" in refused(*train, "--log", "wandb")
    assert not (tmp_path / "work").exists()
    result = run(*train, "--no-report")
    assert result.exit_code == 0, result.output
    assert not list((tmp_path / "work").glob("*.png"))
    assert "pictures" not in result.stdout


def test_logs_are_added_once():
    cfg = load_config("dinat-mini_1xb64-30e_eurosat64")
    for _ in range(2):
        mm.add_logs(cfg, ("tensorboard", "wandb"))
        kinds = [backend["type"] for backend in cfg.visualizer.vis_backends]
        assert kinds == ["LocalVisBackend", "TensorboardVisBackend", "WandbLog"]


def test_wandb_gets_settings_and_no_source_files():
    """A stand-in of the package; mmengine would call `run.log_code`, too."""
    from mmengine.config import Config

    from terrazzo.openmmlab.wandb_log import WandbLog

    called = {}
    config = types.SimpleNamespace(update=lambda values, allow_val_change: called.update(values))
    log = WandbLog("unused")
    log._env_initialized = True
    log._wandb = types.SimpleNamespace(config=config)
    log.add_config(Config({"lr": 0.1}))
    assert called == {"lr": 0.1}


def hook(config, **facts):
    """A hook as in a validation of a config, whose pictures and classes are small."""
    made = ReportHook(load_config(config))
    for key, value in facts.items():
        setattr(made, key, value)
    loader = types.SimpleNamespace(dataset=types.SimpleNamespace(metainfo={}))
    made.before_val_epoch(types.SimpleNamespace(val_dataloader=loader))
    return made


def test_classification(tmp_path):
    made = hook("dinat-mini_1xb64-30e_eurosat64", names=["a", "b", "c"])
    paths = [str(tmp_path / f"{number}.png") for number in range(8)]
    for path in paths:
        Image.new("RGB", (40, 30)).save(path)
    for number, path in enumerate(paths):
        scores = torch.tensor([0.1, 0.7, 0.2])
        sample = {"scores": scores, "pred_label": 1, "gt_label": number % 2}
        made.after_val_iter(None, number, {"img_path": [path]}, [sample])
    made.after_val_epoch(None)
    assert made.matrix.tolist() == [[0, 4, 0], [0, 4, 0], [0, 0, 0]]
    assert len(made.examples) == 6
    assert made.sheet().width > 3 * 320
    made.before_val_epoch(None)
    assert made.matrix.sum() == 0
    assert not made.examples


@pytest.mark.parametrize("scaled", [False, True])
def test_detection(tmp_path, scaled):
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    made = hook("retinanet_dinat-mini_fpn_1xb4-36e_bccd-640x480", names=["cell", "plate"])
    assert made.scaled is False, "the config loads boxes after it resized the picture"
    made.scaled = scaled
    Image.new("RGB", (60, 40)).save(tmp_path / "0.png")
    sample = DetDataSample(metainfo={"img_path": str(tmp_path / "0.png"), "scale_factor": (2.0, 2.0)})
    true = torch.tensor([[0.0, 0, 20, 20], [30, 0, 50, 20], [30, 25, 50, 40]])
    sample.gt_instances = InstanceData(bboxes=true * (2 if scaled else 1), labels=torch.tensor([0, 1, 1]))
    boxes = torch.tensor([[2.0, 0, 20, 20], [30, 0, 50, 20], [0, 30, 10, 40], [0, 0, 9, 9]])
    scores, labels = torch.tensor([0.5, 0.9, 0.8, 0.1]), torch.tensor([0, 0, 1, 1])
    sample.pred_instances = InstanceData(bboxes=boxes, labels=labels, scores=scores)
    made.after_val_iter(None, 0, {"inputs": []}, [sample])
    # True cell found; true plate taken for a cell; another plate missed; a plate where nothing is.
    assert made.matrix.tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]
    assert made.sheet().width > 3 * 320


def test_models_of_other_tasks_have_curves_only():
    made = ReportHook(load_config("m3vit-tiny_1xb8-100e_cityscapes-256x128"))
    assert made.task is None
    made.names = ["a", "b"]
    made.after_val_iter(None, 0, {}, [object()])
    assert not made.examples


def test_confusion_of_labels():
    truth, found = np.array([[0, 1, 255], [2, 2, 2]], np.uint8), np.array([[0, 2, 1], [2, 255, 9]], np.uint8)
    assert confusion.of_labels(truth, found, 3).tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 1]]


def test_confusion_of_no_boxes():
    none, one = np.zeros((0, 4)), np.array([[0.0, 0, 9, 9]])
    label, empty = np.array([0]), np.zeros(0, int)
    assert confusion.of_boxes(none, empty, none, empty, 2).sum() == 0
    assert confusion.of_boxes(one, label, none, empty, 2).tolist() == [[0, 1], [0, 0]]
    assert confusion.of_boxes(none, empty, one, label, 2).tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("classes", [2, 20])
def test_matrices_of_any_size_are_drawn(tmp_path, classes):
    path = tmp_path / "confusion.png"
    confusion.draw_confusion(np.eye(classes, dtype=int), [f"class {index}" for index in range(classes)], path)
    assert Image.open(path).width > 400


def test_curves_of_epochs(tmp_path):
    folder = tmp_path / "run" / "vis_data"
    folder.mkdir(parents=True)
    rows = [{"loss": 2.0, "lr": 0.1, "step": 10}, {"accuracy/top1": 50.0, "step": 1}, {"loss": 1.0, "step": 20}]
    (folder / "scalars.json").write_text("\n".join(map(json.dumps, rows)))
    curves = read_curves(tmp_path)
    assert curves["train"]["loss"] == [(10, 2.0), (20, 1.0)]
    assert curves["val"]["accuracy/top1"] == [(1, 50.0)]
    draw_curves(curves, "epoch", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 1000
    assert read_curves(tmp_path / "run") == {}


def test_a_picture_that_fails_does_not_fail_the_training(tmp_path, capsys):
    made = hook("dinat-mini_1xb64-30e_eurosat64", names=["a", "b"])
    made.matrix = "no matrix"
    made.after_train(types.SimpleNamespace(work_dir=tmp_path, train_loop=None))
    assert "note: no pictures of the training: AttributeError" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "write", "options"),
    [
        (
            "dinat-mini_1xb64-30e_eurosat64",
            lambda root, cfg: tiny_data.write_folders(root, cfg.metainfo.classes, (64, 64)),
            ("model.backbone.drop_path_rate=0.0",),
        ),
        (
            "retinanet_dinat-mini_fpn_1xb4-36e_bccd-640x480",
            lambda root, cfg: tiny_data.write_detection(root, cfg.metainfo.classes, (96, 64), False),
            ("model.backbone.out_indices=(2, 3, 4)", "model.test_cfg.score_thr=0"),
        ),
    ],
)
def test_other_tasks_whole(run, tmp_path, config, write, options):
    write(tmp_path / "data", load_config(config))
    places = ("--data-root", tmp_path / "data", "--work-dir", tmp_path / "work")
    options = ("model.backbone.name=resnet10t", "train_dataloader.batch_size=2", *options)
    result = run("train", config, *places, "--max-epochs", 1, *options)
    assert result.exit_code == 0, result.output
    assert "curves.png, confusion.png, examples.png" in result.stdout, result.output


@pytest.mark.slow
def test_two_processes(tmp_path):
    """The first process draws, and the confusions are of all processes' pictures."""
    config = "dinat-mini_1xb64-30e_eurosat64"
    tiny_data.write_folders(tmp_path / "data", load_config(config).metainfo.classes, (64, 64))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "terrazzo"]
    command += ["train", config, "--launcher", "pytorch", "--data-root", str(tmp_path / "data")]
    command += ["--work-dir", str(tmp_path / "work"), "--max-epochs", "1", "model.backbone.name=resnet10t"]
    command += ["model.backbone.drop_path_rate=0.0", "train_dataloader.batch_size=4", "train_dataloader.num_workers=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("curves.png, confusion.png, examples.png") == 1
