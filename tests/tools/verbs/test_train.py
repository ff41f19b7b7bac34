"""`terrazzo train` and `terrazzo test`, run as by a user."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support import tiny_data

from terrazzo.openmmlab.config import load_config

CONFIG = "fpn_dinat-mini_floors"
TINY = (
    *("--cfg-options", "model.backbone.name=resnet10t", "model.backbone.out_indices=(1, 2, 3, 4)"),
    *("train_dataloader.batch_size=2", "model.data_preprocessor.size=(64, 64)"),
)


def _refuse(*args, **kwargs):
    raise AssertionError("weights are fetched")


@pytest.mark.long
def test_train_resume_and_test(shell, run, floors, tmp_path, monkeypatch):
    work_dir, out = tmp_path / "work", tmp_path / "metrics.json"
    places = ("--data-root", floors, "--work-dir", work_dir)
    first = shell("train", CONFIG, *places, "--max-iters", 2, "--seed", 1, *TINY)
    assert first.returncode == 0, first.stderr
    assert first.stdout.rstrip().endswith("iter_2.pth")
    assert "Traceback" not in first.stderr
    more = run("train", CONFIG, *places, "--max-iters", 3, "--resume", *TINY)
    assert more.exit_code == 0, more.output
    assert "trained 3 iterations" in more.stdout
    assert (work_dir / "iter_3.pth").is_file()
    # A checkpoint has all weights, so published weights are not fetched.
    monkeypatch.setattr("timm.models._builder.load_pretrained", _refuse)
    options = (*TINY, "model.backbone.pretrained=True")
    tested = run("test", CONFIG, work_dir / "iter_3.pth", "--data-root", floors, "--out", out, *options)
    assert tested.exit_code == 0, tested.output
    assert "mIoU" in tested.stdout
    assert 0 <= json.loads(out.read_text())["mIoU"] <= 100


@pytest.mark.long
def test_the_model_is_built_once(run, floors, tmp_path, monkeypatch):
    built, create = [], timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: built.append(1) or create(*args, **kwargs))
    places = ("--data-root", floors, "--work-dir", tmp_path)
    trained = run("train", CONFIG, *places, "--max-iters", 1, *TINY)
    assert trained.exit_code == 0, trained.output
    assert len(built) == 1
    tested = run("test", CONFIG, tmp_path / "iter_1.pth", "--data-root", floors, *TINY)
    assert tested.exit_code == 0, tested.output
    assert len(built) == 2


def test_shortened_schedules_end_with_the_training():
    from terrazzo.tools import mm

    cfg = load_config(CONFIG)
    mm.shorten(cfg, 50, None)
    assert cfg.train_cfg.max_iters == 50
    assert cfg.train_cfg.val_interval <= 50
    assert cfg.default_hooks.checkpoint.interval <= 50
    assert cfg.default_hooks.logger.interval == 10
    assert cfg.param_scheduler[-1].end == 50
    mm.shorten(cfg, 3, None)
    assert cfg.default_hooks.logger.interval == 3  # otherwise a short run would log no loss


def points(cfg):
    """The begin, end and milestones of each schedule of a config."""
    return [(item.get("begin"), item.get("end"), item.get("milestones")) for item in cfg.param_scheduler]


@pytest.mark.parametrize(
    ("name", "epochs", "expected"),
    [
        # The config has 0 to 20 and 20 to 300 of 310 epochs.
        ("dinat-mini_8xb128-300e_imagenet", 31, [(0, 2, None), (2, 30, None)]),
        ("dinat-mini_8xb128-300e_imagenet", 1, [(0, 1, None), (0, 1, None)]),
        ("dinat-mini_8xb128-300e_imagenet", 620, [(0, 40, None), (40, 600, None)]),
        # The config has 0 to 500 iterations, and milestones at 27 and 33 of 36 epochs.
        ("mask-rcnn_dinat-mini_fpn_3x_coco", 12, [(0, 167, None), (0, 12, [9, 11])]),
        ("mask-rcnn_dinat-mini_fpn_3x_coco", 1, [(0, 14, None), (0, 1, [1, 1])]),
        ("mask-rcnn_dinat-mini_fpn_3x_coco", 36, [(0, 500, None), (0, 36, [27, 33])]),
    ],
)
def test_shortened_schedules_keep_their_proportions(name, epochs, expected):
    from terrazzo.tools import mm

    cfg = load_config(name)
    mm.shorten(cfg, None, epochs)
    assert points(cfg) == expected


def test_shortened_schedules_of_iterations():
    from terrazzo.tools import mm

    cfg = load_config("mask2former_dinat-large_16xb1-lsj-100e_coco", options={"param_scheduler.T_max": 737_500})
    mm.shorten(cfg, 7375, None)
    assert cfg.param_scheduler.end == 7375  # a single schedule may be without a list
    assert cfg.param_scheduler.T_max == 7375
    assert cfg.param_scheduler.milestones == [6556, 7102]


@pytest.mark.parametrize("length", [5, 1])
def test_rate_of_a_shortened_run(length):
    """With the ImageNet schedule over a few epochs of 4 batches, the rate rises, falls, and ends at its minimum."""
    from mmengine.optim import OptimWrapper
    from mmengine.registry import PARAM_SCHEDULERS

    from terrazzo.tools import mm

    cfg = load_config("dinat-mini_8xb128-300e_imagenet")
    mm.shorten(cfg, None, length)
    optimizer = OptimWrapper(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3))
    parts = {"optimizer": optimizer, "epoch_length": 4}
    schedules = [PARAM_SCHEDULERS.build(settings, default_args=parts) for settings in cfg.param_scheduler]
    rates = []
    for _ in range(4 * length):
        rates.append(optimizer.get_lr()["lr"][0])
        optimizer.step()
        for schedule in schedules:
            schedule.step()
    top = max(rates)
    place = rates.index(top)
    assert rates == sorted(rates[:place]) + sorted(rates[place:], reverse=True)
    assert rates[0] < 1e-5
    assert 2e-4 < top <= 1e-3
    assert rates[-1] < top / 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fpn_dinat-mini_flors",), "did you mean fpn_dinat-mini_floors"),
        (("no/such/config.py",), "no/such/config.py"),
        ((CONFIG, "--data-root", "{tmp}/nowhere"), "nowhere/images/train does not exist"),
        ((CONFIG, "--data-root", "{floors}", "model.decode_head.num_classes=4"), "has 6 classes"),
        ((CONFIG, "--data-root", "{floors}", "--max-epochs", "2"), "use --max-iters"),
        ((CONFIG, "--data-root", "{floors}", "--max-epochs", "2", "--max-iters", "2"), "give one of them"),
        ((CONFIG, "--data-root", "{floors}", "--resume"), "no checkpoint to resume from"),
        ((CONFIG, "--data-root", "{floors}", "--cfg-options", "batch"), "KEY=VALUE"),
        ((CONFIG, "--data-root", "{floors}", "model.backbone.name=dinat_minny"), "dinat_mini"),
        ((CONFIG, "--data-root", "{floors}", "model.neck.type=FPM"), "FPM"),
        ((CONFIG, "--data-root", "{floors}", "model.neck.num_outs=none"), "cannot be built"),
        (("{broken}",), "cannot be read"),
    ],
)
def test_train_refusals_leave_no_work_dir(refused, floors, tmp_path, arguments, words):
    broken = tmp_path / "broken.py"
    broken.write_text("model = dict(\n")
    filled = [part.format(tmp=tmp_path, floors=floors, broken=broken) for part in arguments]
    assert words in refused("train", *filled, "--work-dir", tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_train_refuses_amp_without_a_gpu(refused, floors, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = refused("train", CONFIG, "--data-root", floors, "--work-dir", tmp_path / "work", "--amp", "fp16")
    assert "needs a GPU" in words
    assert not (tmp_path / "work").exists()


def test_train_refuses_a_work_dir_below_a_file(refused, floors, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "is a file" in refused("train", CONFIG, "--data-root", floors, "--work-dir", tmp_path / "file" / "work")


def test_train_refuses_an_empty_data_folder(refused, floors, tmp_path):
    copy = shutil.copytree(floors, tmp_path / "floors")
    shutil.rmtree(copy / "images" / "val")
    (copy / "images" / "val").mkdir()
    assert "is empty" in refused("train", CONFIG, "--data-root", copy, "--work-dir", tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_train_refuses_labels_beyond_the_classes(refused, floors, tmp_path):
    copy = shutil.copytree(floors, tmp_path / "floors")
    Image.fromarray(np.full((64, 64), 6, np.uint8)).save(copy / "labels" / "train" / "floor_0001.png")
    words = refused("train", CONFIG, "--data-root", copy, "--work-dir", tmp_path / "work")
    assert "floor_0001.png has class 6, but the config has 6 classes" in words
    assert not (tmp_path / "work").exists()


def test_train_refuses_categories_of_other_names(refused, floors, tmp_path):
    """The detection config for blood cells gets floors: the annotation file lacks the config's categories."""
    copy = shutil.copytree(floors, tmp_path / "floors")
    config = "retinanet_dinat-mini_fpn_1xb4-36e_bccd-640x480"
    assert "does not have RBC" in refused("train", config, "--data-root", copy, "--work-dir", tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_train_refuses_folders_of_other_names(refused, floors, tmp_path):
    config = "dinat-mini_1xb64-30e_eurosat64"
    words = refused("train", config, "--data-root", floors / "chips", "--work-dir", tmp_path / "work")
    assert "has classes basalt, glass" in words
    assert not (tmp_path / "work").exists()


def test_train_refuses_to_resume_from_a_broken_checkpoint(refused, floors, tmp_path):
    (tmp_path / "iter_2.pth").write_bytes(b"half")
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_2.pth"))
    assert "is refused" in refused("train", CONFIG, "--data-root", floors, "--work-dir", tmp_path, "--resume")


def test_test_refusals(refused, trained, floors, tmp_path):
    config, checkpoint = trained
    saved = torch.load(checkpoint, weights_only=True)
    half = tmp_path / "half.pth"
    half.write_bytes(checkpoint.read_bytes()[:1000])
    saved["state_dict"] = {
        name: value[:4] if name.startswith("decode_head.conv_seg") else value
        for name, value in saved["state_dict"].items()
    }
    torch.save(saved, tmp_path / "four.pth")
    out = ("--out", tmp_path / "out" / "metrics.json")
    assert "does not exist" in refused("test", config, tmp_path / "none.pth", *out)
    assert "is refused" in refused("test", config, half, *out)
    assert "other classes" in refused("test", config, tmp_path / "four.pth", *out)
    assert "nowhere" in refused("test", config, checkpoint, "--data-root", tmp_path / "nowhere", *out)
    assert "is a file" in refused("test", config, checkpoint, "--out", half / "metrics.json")
    assert "did you mean" in refused("test", "fpn_dinat-mini_flors", checkpoint, *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_checkpoints_carry_the_mixer(refused, run, tmp_path):
    """A training writes how its model was changed; testing, resuming and fine-tuning another model end in one line."""
    config, work_dir = "dinat-mini_1xb64-30e_clothing96", tmp_path / "work"
    tiny_data.write_folders(tmp_path / "data", load_config(config).metainfo.classes, (64, 64))
    plain = ("model.backbone.name=test_vit", "model.backbone.dynamic_img_size=True")
    plain = ("--cfg-options", *plain, "train_dataloader.batch_size=4", "train_dataloader.num_workers=0")
    plain = (*plain, "train_dataloader.persistent_workers=False", "test_dataloader.num_workers=0")
    mixed = (*plain, "model.backbone.convert.mixer=hedgehog", "model.backbone.convert.layers=[0,2]")
    train = ("train", config, "--data-root", tmp_path / "data", "--max-epochs", 1, "--work-dir", work_dir)
    done = run(*train, *mixed)
    assert done.exit_code == 0, done.output
    (checkpoint,) = work_dir.glob("epoch_1.pth")
    entry = {"mixer": "hedgehog", "options": {}, "layers": [0, 2]}
    assert torch.load(checkpoint, weights_only=True)["meta"]["terrazzo.changes"] == {"convert": [entry]}
    test = ("test", config, checkpoint, "--data-root", tmp_path / "data")
    wanted = "pass convert=dict(mixer='hedgehog', layers=[0, 2])"
    assert wanted in refused(*test, *plain)
    assert wanted in refused(*train, "--resume", *plain)
    assert wanted in refused(*train[:-1], tmp_path / "other", *plain, f"load_from={checkpoint}")
    done = run(*test, *mixed)
    assert done.exit_code == 0, done.output


@pytest.mark.long
def test_a_recipe_is_for_training_alone(refused, run, tmp_path):
    """Training without the teacher's weights is refused before files are written; testing needs no teacher."""
    config = "asvit-deit-tiny_1xb64-30e_eurosat64"
    cfg = load_config(config)
    tiny_data.write_folders(tmp_path, cfg.metainfo.classes, (64, 64))
    words = refused("train", config, "--data-root", tmp_path, "--work-dir", tmp_path / "work")
    assert "set backbone.checkpoint or recipe.teacher" in words
    assert not (tmp_path / "work").exists()
    small = dict(cfg.model.backbone, embed_dim=48, depth=3, blocks=(1, 2))
    model = timm.create_model(small.pop("name"), **small)
    weights = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "trained.pth")
    options = ("model.backbone.embed_dim=48", "model.backbone.depth=3", "model.backbone.blocks=(1, 2)")
    options = ("--cfg-options", *options, "test_dataloader.num_workers=0")
    tested = run("test", config, tmp_path / "trained.pth", "--data-root", tmp_path, *options)
    assert tested.exit_code == 0, tested.output
    assert "accuracy/top1" in tested.stdout
