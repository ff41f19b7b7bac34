"""Finding and adjusting configs."""

import pytest

from terrazzo.errors import InputError
from terrazzo.openmmlab.config import build_runner, find_config, load_config, packaged_configs, parse_options

RETINANET = "retinanet_dinat-mini_fpn_1xb4-36e_bccd-640x480"


def test_finds_by_name_by_file_name_and_by_tail():
    path = packaged_configs()[RETINANET]
    assert find_config(RETINANET) == path
    assert find_config(f"{RETINANET}.py") == path
    assert find_config(f"configs/detection/{RETINANET}.py").resolve() == path
    assert find_config(path) == path


def test_unknown_name_lists_close_ones():
    with pytest.raises(InputError, match=RETINANET):
        find_config("retinanet_dinat-mini_bccd")


@pytest.mark.parametrize("text", ["model = dict(", "raise RuntimeError('no')", "_base_ = ['missing.py']"])
def test_unreadable_config_names_the_file(tmp_path, text):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(InputError, match=r"broken\.py"):
        load_config(path)


def test_data_root_moves_every_path():
    cfg = load_config(RETINANET, data_root="/elsewhere/cells/")
    assert cfg.data_root == "/elsewhere/cells"
    assert cfg.train_dataloader.dataset.data_root == "/elsewhere/cells"
    assert cfg.val_evaluator.ann_file == "/elsewhere/cells/annotations/instances_val.json"
    assert "data/bccd" not in cfg.pretty_text


def test_data_root_among_the_options_acts_alike():
    cfg = load_config(RETINANET, options={"data_root": "/elsewhere"})
    assert cfg.test_evaluator.ann_file == "/elsewhere/annotations/instances_test.json"


def test_options_are_applied_and_workers_settled():
    cfg = load_config(RETINANET, options={"train_dataloader.num_workers": 0, "train_dataloader.batch_size": 3})
    assert cfg.train_dataloader.batch_size == 3
    assert cfg.train_dataloader.persistent_workers is False


def test_option_that_does_not_fit():
    with pytest.raises(InputError, match="param_scheduler"):
        load_config(RETINANET, options={"param_scheduler.9.begin": 1})


def test_class_count_of_a_head_is_checked():
    with pytest.raises(InputError, match=r"model\.bbox_head\.num_classes is 80.*3 classes"):
        load_config(RETINANET, options={"model.bbox_head.num_classes": 80})


def test_class_count_of_a_classifier_is_checked():
    with pytest.raises(InputError, match=r"model\.backbone\.num_classes is 7"):
        load_config("dinat-mini_1xb64-30e_eurosat64", options={"model.backbone.num_classes": 7})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, None),
        (
            {"model.panoptic_fusion_head.num_stuff_classes": 5},
            r"fusion_head.num_things_classes \+ num_stuff.* is 7, .*4 c",
        ),
        ({"model.panoptic_head.num_things_classes": 3}, r"panoptic_head\.num_things_classes is 3, .* 2 thing classes"),
    ],
)
def test_class_counts_of_a_panoptic_head_are_checked(options, words):
    metainfo = {
        "classes": ("cat", "dog", "sky", "sea"),
        "thing_classes": ("cat", "dog"),
        "stuff_classes": ("sky", "sea"),
    }
    heads = ("panoptic_head", "panoptic_fusion_head")
    counts = {f"model.{head}.num_{kind}_classes": 2 for head in heads for kind in ("things", "stuff")}
    fitting = {"train_dataloader.dataset.metainfo": metainfo, **counts}
    if words is None:
        load_config("mask2former_dinat-large_16xb1-lsj-100e_coco-panoptic", options=fitting)
    else:
        with pytest.raises(InputError, match=words):
            load_config("mask2former_dinat-large_16xb1-lsj-100e_coco-panoptic", options={**fitting, **options})


def test_parse_options():
    pairs = ["a.b=1", "c=[1, 2]", "d=text", "e=false", "f=x=y"]
    assert parse_options(pairs) == {"a.b": 1, "c": [1, 2], "d": "text", "e": False, "f": "x=y"}
    with pytest.raises(InputError, match="KEY=VALUE"):
        parse_options(["nonsense"])


def test_missing_data_folder_is_one_clear_line(tmp_path):
    cfg = load_config(RETINANET, data_root=tmp_path / "none")
    with pytest.raises(InputError, match=r"train_dataloader .*none"):
        build_runner(cfg, tmp_path / "work", purpose="train")
    assert not (tmp_path / "work").exists()


def test_missing_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"gone\.pth"):
        build_runner(load_config(RETINANET, data_root=tmp_path), tmp_path, load_from=tmp_path / "gone.pth")
