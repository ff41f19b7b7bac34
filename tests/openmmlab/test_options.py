"""Options of the command line: their values, their effects, and refused options."""

import sys

import pytest

from terrazzo.errors import InputError
from terrazzo.openmmlab.config import find_config, load_config, parse_options

RETINANET = "retinanet_dinat-mini_fpn_1xb4-36e_bccd-640x480"
FLOORS = "fpn_dinat-mini_floors"
UPERNET = "upernet_dinat-mini_1xb4-10k_camvid-480x360"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[bbox]", ["bbox"]),
        ("[bbox,segm]", ["bbox", "segm"]),
        ("[bbox, segm]", ["bbox", "segm"]),
        ("(a,b)", ("a", "b")),
        ("bbox,segm", ["bbox", "segm"]),
        ("1,2", [1, 2]),
        ("(1,2)", (1, 2)),
        ("[(1, 2, 3), [a, b], c]", [(1, 2, 3), ["a", "b"], "c"]),
        ('"[a, b]"', ["a", "b"]),
        ("'[(1,2),(3,4)]'", [(1, 2), (3, 4)]),
        ("[traffic light,car]", ["traffic light", "car"]),
        ("[true,None,1e-3,x]", [True, None, 1e-3, "x"]),
        ("[a,]", ["a"]),
        ("[]", []),
        ("{'type': 'SGD', 'lr': 0.1}", {"type": "SGD", "lr": 0.1}),
        ("inf", float("inf")),
        ("'1'", "1"),
        ("a b", "a b"),
        ("FN(x)", "FN(x)"),
        ("None", None),
        ("TRUE", True),
    ],
)
def test_values(text, value):
    read = parse_options([f"a.b={text}"])["a.b"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("text", ["[1,(2]", "[a", "(a,b", "a],b", "{type:SGD}"])
def test_values_that_cannot_be_read(text):
    with pytest.raises(InputError, match=r"a=.* cannot be read"):
        parse_options([f"a={text}"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optim_wraper.lr": 1}, "did you mean optim_wrapper"),
        ({"train_dataloder": 1}, "did you mean train_dataloader"),
        ({"randomnes.seed": 1}, "did you mean randomness"),
        ({"nothing_like_it": 1}, "its keys are"),
        ({"vis_backend": []}, "did you mean vis_backends"),
        ({"model": 3}, r"set model\.KEY=VALUE"),
        ({"train_pipeline.99.scale": 1}, "has no effect|do not fit"),
    ],
)
def test_keys_that_nothing_reads(options, words):
    with pytest.raises(InputError, match=words):
        load_config(UPERNET, options=options)


@pytest.mark.parametrize(
    "options", [{"randomness.seed": 3}, {"load_from": "x.pth"}, {"model.backbone.new": 1}, {"compile": True}]
)
def test_keys_that_the_runner_knows_may_be_new(options):
    cfg = load_config(FLOORS, options=options)
    (key, value), *_ = options.items()
    found = cfg
    for part in key.split("."):
        found = found[part]
    assert found == value


def test_a_pipeline_is_changed_where_it_is_used():
    cfg = load_config(RETINANET, options={"train_pipeline.2.scale": (64, 48), "test_pipeline.1.scale": (32, 24)})
    assert cfg.train_dataloader.dataset.pipeline[2].scale == (64, 48)
    assert cfg.val_dataloader.dataset.pipeline[1].scale == (32, 24)
    assert cfg.test_dataloader.dataset.pipeline[1].scale == (32, 24)
    assert cfg.train_pipeline[2].scale == (64, 48)


def test_a_variable_reaches_all_that_is_made_of_it():
    """A crop size changes the pipeline and, through another file, the model; equal numbers of other keys stay."""
    cfg = load_config(FLOORS, options={"crop_size": (64, 64)})
    assert cfg.train_dataloader.dataset.pipeline[2].crop_size == (64, 64)
    assert cfg.model.data_preprocessor.size == (64, 64)
    cfg = load_config(RETINANET, options={"metainfo.classes": ("a", "b", "c"), "dataset_type": "VOCDataset"})
    assert cfg.val_dataloader.dataset.metainfo.classes == ("a", "b", "c")
    assert cfg.test_dataloader.dataset.type == "VOCDataset"


def test_a_variable_inside_an_expression(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("width = 8\nmodel = dict(type='A', widths=[width * n for n in (1, 2)])\nunused = [dict(scale=1)]\n")
    assert load_config(path, options={"width": 3}).model.widths == [3, 6]
    assert load_config(path, options={"unused.0.scale": 1}).unused[0].scale == 1  # its current value
    with pytest.raises(InputError, match=r"unused\.0\.scale=2 has no effect"):
        load_config(path, options={"unused.0.scale": 2})


def test_what_has_no_effect_names_the_keys_to_set(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        f"_base_ = ['{find_config(RETINANET)}']\n"
        "train_dataloader = dict(dataset=dict(pipeline=[dict(type='A'), dict(type='B', scale=1)]))\n"
        "train_pipeline = [dict(type='A'), dict(type='C', scale=2)]\n"
    )
    with pytest.raises(InputError, match=r"; set train_dataloader\.dataset\.pipeline\.1\.scale$"):
        load_config(path, options={"train_pipeline.1.scale": 9})


def test_delete_and_list_options_still_merge():
    options = {"optim_wrapper.optimizer": {"_delete_": True, "type": "SGD", "lr": 0.1}, "param_scheduler.0.begin": 1}
    cfg = load_config(RETINANET, options=options)
    assert cfg.optim_wrapper.optimizer == {"type": "SGD", "lr": 0.1}
    assert cfg.param_scheduler[0].begin == 1


def test_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = load_config(RETINANET, options={"data_root": "~/cells", "load_from": "~/a.pth"})
    assert cfg.train_dataloader.dataset.data_root == f"{tmp_path}/cells"
    assert cfg.val_evaluator.ann_file.startswith(f"{tmp_path}/cells/")
    assert cfg.load_from == f"{tmp_path}/a.pth"


@pytest.mark.parametrize("name", [f"terrazzo::detection/{RETINANET}.py", f"terrazzo::{RETINANET}", RETINANET])
def test_a_packaged_base(tmp_path, name):
    path = tmp_path / "own.py"
    path.write_text(f"_base_ = ['{name}']\nmodel = dict(bbox_head=dict(stacked_convs=1))\n")
    cfg = load_config(path)
    assert cfg.model.bbox_head.stacked_convs == 1
    assert cfg.model.bbox_head.num_classes == 3


@pytest.mark.parametrize("suffix", [".py", ""])
def test_a_config_of_another_package(suffix):
    cfg = load_config(f"mmdet::retinanet/retinanet_r50_fpn_1x_coco{suffix}")
    assert cfg.model.type == "RetinaNet"
    assert load_config(f"mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024{suffix}").model.type == "EncoderDecoder"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mmdet::retinanet/retinanet_r50_fpn_1x_coc.py", "did you mean mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"),
        ("mmfoo::a/b.py", "mmfoo"),
        ("mmpose::a/b.py", "not installed"),
        ("terrazzo::retinanet_dinat", "did you mean"),
    ],
)
def test_configs_of_packages_that_are_not_there(name, words):
    with pytest.raises(InputError, match=words):
        load_config(name)


def test_a_module_beside_the_config(tmp_path):
    (tmp_path / "beside_it.py").write_text("VALUE = 3\n")
    path = tmp_path / "own.py"
    path.write_text("custom_imports = dict(imports=['beside_it'])\nmodel = dict(type='A')\n")
    before = list(sys.path)
    try:
        load_config(path)
        assert sys.modules["beside_it"].VALUE == 3
        assert sys.path[-1] == str(tmp_path)  # newly started worker processes import it, too
    finally:
        sys.path[:] = before
        sys.modules.pop("beside_it", None)


def test_a_folder_without_modules_leaves_the_path_alone(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("model = dict(type='A')\n")
    before = list(sys.path)
    load_config(path)
    assert sys.path == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No module named 'beside_two'"),
        ("import nothing_of_this_name", "nothing_of_this_name"),
        ("1 / 0", "Zero"),
    ],
)
def test_a_module_that_cannot_be_imported(tmp_path, content, words):
    if content:
        (tmp_path / "beside_two.py").write_text(content)
    path = tmp_path / "own.py"
    path.write_text("custom_imports = dict(imports=['beside_two'])\nmodel = dict(type='A')\n")
    before = list(sys.path)
    with pytest.raises(InputError, match=words):
        load_config(path)
    assert sys.path == before


@pytest.mark.parametrize(
    ("test_cfg", "words"),
    [
        ({"mode": "slide"}, "crop_size is None"),
        ({"mode": "slide", "crop_size": (9, 9)}, "stride is None"),
        ({"mode": "slide", "crop_size": 9, "stride": (9, 9)}, "crop_size is 9"),
        ({"mode": "slide", "crop_size": (9, 9), "stride": (9, 10)}, "larger than crop_size"),
        ({"mode": "slid"}, "choose whole or slide"),
    ],
)
def test_sliding_windows(test_cfg, words):
    with pytest.raises(InputError, match=words):
        load_config(FLOORS, options={f"model.test_cfg.{key}": value for key, value in test_cfg.items()})
