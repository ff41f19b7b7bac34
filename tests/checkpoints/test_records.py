"""Checkpoints say how their model was changed, and a model that was changed in another way refuses them."""

import copy
import json
import logging
import shlex

import mmengine.runner
import pytest
import timm
import torch
from mmengine.model import BaseModule, initialize
from safetensors import safe_open

import terrazzo
from terrazzo.backbones._hosts import record_of
from terrazzo.backbones._weights import weights_of
from terrazzo.checkpoints.files import load_file, save_file
from terrazzo.checkpoints.loading import load_weights
from terrazzo.checkpoints.records import KEY, arguments, check_changes, command, meta_of, recorded
from terrazzo.errors import InputError, WeightsError
from terrazzo.openmmlab import Classifier, TerrazzoBackbone
from terrazzo.openmmlab.checkpoint import save_checkpoint
from terrazzo.tools.mechanisms import changed, chosen

NAME = "test_vit"
MERGING = dict(method="mctf", r=4, criteria=(1, 0, 40), blocks=(3, 4))


def build(*converts, reduce=None):
    """A tiny ViT, changed by calls of `convert_attention` and of `reduce`."""
    model = timm.create_model(NAME)
    for options in converts:
        terrazzo.convert_attention(model, **options)
    return model if reduce is None else terrazzo.reduce(model, **reduce)


LLSA = dict(mixer="llsa", topk=2, layers=(0, 1))
HEDGEHOG = dict(mixer="hedgehog", layers=[2])


def write(model, path):
    save_checkpoint({"state_dict": model.state_dict(), "meta": {"epoch": 1, **meta_of(record_of(model))}}, str(path))
    return str(path)


def test_a_record_of_several_calls():
    model = build(LLSA, HEDGEHOG, dict(mixer="llsa", topk=2, layers=[3]))
    assert json.loads(json.dumps(model.changes)) == model.changes
    llsa, hedgehog = model.changes["convert"]
    assert (llsa["mixer"], llsa["layers"], llsa["options"]["topk"]) == ("llsa", [0, 1, 3], 2)
    assert llsa["options"]["edge"] == 8  # a default
    assert hedgehog == {"mixer": "hedgehog", "options": {}, "layers": [2]}
    assert copy.deepcopy(model).changes == model.changes
    terrazzo.convert_attention(model, "softmax", layers=[0, 1, 3])
    assert model.changes == {"convert": [hedgehog]}
    terrazzo.reduce(model, **MERGING)
    reduction = model.changes["reduce"]
    assert (reduction["method"], reduction["blocks"]) == ("mctf", [3, 4])
    assert (reduction["options"]["r"], reduction["options"]["restore"]) == (4, "delta")
    terrazzo.reduce(terrazzo.convert_attention(model, "softmax"), method="asvit", window=None)
    assert model.changes["reduce"]["method"] == "asvit"
    assert "convert" not in model.changes


def test_unchanged_models_have_no_record():
    assert record_of(build()) == record_of(timm.create_model("resnet10t")) == meta_of({}) == {}
    assert record_of(build(LLSA, dict(mixer="softmax"))) == {}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_carry_it(suffix, tmp_path):
    """The files load as safely as before."""
    model = build(LLSA, HEDGEHOG, reduce=dict(MERGING))
    path = write(model, tmp_path / f"x{suffix}")
    assert recorded(load_file(path), path) == model.changes
    if suffix == ".pth":
        assert torch.load(path, weights_only=True)["meta"] == {"epoch": 1, KEY: model.changes}
    else:
        assert load_file(path).keys() == model.state_dict().keys()
        with safe_open(path, framework="pt") as file:
            assert set(file.metadata()) == {KEY}


def test_a_record_is_written_as_what_to_pass():
    """The texts give the same model again, by a command and by a backbone."""
    model = build(dict(mixer="llsa", topk=2, layers=[1]), HEDGEHOG, reduce=MERGING)
    texts = shlex.split(command(model, model.changes))
    assert texts[:2] == ["--mixer", "llsa,topk=2,layers=(1,)"]
    named = [
        [texts[i + 1] for i in range(0, len(texts), 2) if texts[i] == option] for option in ("--mixer", "--reduce")
    ]
    assert record_of(changed(build(), chosen(named[0], [], named[1]))) == model.changes
    settings = eval(f"dict({arguments(model, model.changes).replace(' and ', ', ')})")
    assert record_of(TerrazzoBackbone(NAME, out_indices=(5,), **settings)) == model.changes
    everywhere, merging = build(dict(mixer="llsa", topk=8, edge=8)), build(reduce=dict(r=8))
    assert command(everywhere, everywhere.changes) == "--mixer llsa,topk=8"
    assert arguments(everywhere, everywhere.changes) == "convert=dict(mixer='llsa', topk=8)"
    assert command(merging, merging.changes) == "--reduce mctf,r=8"


@pytest.mark.parametrize(
    ("own", "has"),
    [
        ({}, "which has none"),
        ({"converts": [dict(mixer="hedgehog")]}, r"which has --mixer hedgehog"),
        ({"converts": [dict(mixer="llsa", layers=[0])]}, r"which has --mixer 'llsa,layers=\(0,\)'"),
        ({"reduce": MERGING}, "which has --reduce 'mctf"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_mixers_are_refused(own, has, suffix, tmp_path):
    path = write(build(LLSA), tmp_path / f"x{suffix}")
    model = build(*own.get("converts", ()), reduce=own.get("reduce"))
    with pytest.raises(InputError, match=rf"{has}.*: pass --mixer 'llsa,topk=2,layers=\(0,1\)'$") as refusal:
        load_weights(model, NAME, path, r"\.attn\.mixer\.", advice=command)
    assert "\n" not in str(refusal.value)
    load_weights(model, NAME, path, r"\.attn\.mixer\.", advice=None)


def test_another_reduction_is_refused(tmp_path):
    path = write(build(reduce=MERGING), tmp_path / "x.pth")
    for other in (None, dict(MERGING, blocks=(3,)), dict(method="asvit")):
        with pytest.raises(InputError, match=r"pass reduce=dict\(method='mctf', r=4.*blocks=\[3, 4\]\)$"):
            load_weights(build(reduce=other), NAME, path, "^reducer")
    load_weights(build(reduce=MERGING), NAME, path)


def test_what_may_differ(tmp_path, caplog):
    """Options, which a warning says, and changes that the record says nothing about."""
    path = write(build(LLSA), tmp_path / "x.pth")
    with caplog.at_level(logging.WARNING):
        load_weights(build(LLSA), NAME, path)
        load_weights(build(LLSA, reduce=dict(MERGING)), NAME, path)
    assert not caplog.records
    load_weights(build(dict(LLSA, topk=4)), NAME, path)
    assert "topk=2 and not 4" in caplog.text
    load_weights(build(HEDGEHOG), NAME, write(build(), tmp_path / "plain.pth"), r"\.attn\.mixer\.")


def test_weights_of_mixers_without_a_record(tmp_path, caplog):
    """They load as ever, and a warning or the error's line says that the model lacks the mixers."""
    save_file(build(HEDGEHOG).state_dict(), tmp_path / "x.safetensors")
    load_weights(build(), NAME, str(tmp_path / "x.safetensors"))
    assert "has 2 tensors of mixers, such as blocks.2.attn.mixer" in caplog.text
    assert "convert the model first" in caplog.text
    plain = timm.create_model("mctf_deit_tiny", device="meta")
    state = plain.state_dict() | {"blocks.2.attn.mixer.query_map": torch.ones(2)}
    with pytest.raises(WeightsError, match=r"it has parameters of mixers.*convert the model first") as refusal:
        plain.load_state_dict(state)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "record",
    [
        3,
        "{",
        [1],
        {"convert": 1},
        {"convert": [{"mixer": "llsa"}]},
        {"convert": [{"mixer": "a\nb", "options": {}, "layers": [0]}]},
        {"convert": [{"mixer": "llsa", "options": {}, "layers": [True]}]},
        {"convert": [{"mixer": "llsa", "options": {"a b": 1}, "layers": [0]}]},
        {"reduce": {"method": "mctf", "options": [], "blocks": "all"}},
    ],
    ids=str,
)
def test_malformed_records_are_one_line(record):
    with pytest.raises(InputError, match=r"'x\.pth' has a malformed record") as refusal:
        recorded({"meta": {KEY: record}}, "x.pth")
    assert "\n" not in str(refusal.value)


def test_a_mixer_of_another_version():
    """A mechanism that this version lacks is named, and what it does not know of a record is left out."""
    entry = {"mixer": "future", "options": {"a": "1\n"}, "layers": [0], "more": 1}
    record = recorded({"meta": {KEY: {"convert": [entry], "new": 1}}})
    assert record == {"convert": [{key: entry[key] for key in ("mixer", "options", "layers")}]}
    with pytest.raises(InputError, match=r"pass --mixer 'future,a=1\?,layers=\(0,\)'"):
        check_changes(build(), record, "x.pth", command)


class Wrapped(BaseModule):
    """A ViT inside a module of mmengine, as in a segmentor."""

    def __init__(self, backbone, **options):
        super().__init__(**options)
        self.backbone = backbone


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_mmengine_compares_it_too(suffix, tmp_path):
    """`load_checkpoint` and `init_cfg`, which load what fits and only log the rest."""
    path = write(Wrapped(build(HEDGEHOG)), tmp_path / f"x{suffix}")
    for options in (dict(checkpoint=path), dict(checkpoint=path, prefix="backbone")):
        init_cfg = dict(type="Pretrained", **options)
        part = Wrapped(build(), init_cfg=init_cfg)
        if "prefix" in options:
            part = part.backbone  # a part of the model gets a part of the weights
        with pytest.raises(InputError, match=r"pass convert=dict\(mixer='hedgehog', layers=\[2\]\)$"):
            initialize(part, init_cfg)
        same = Wrapped(build(HEDGEHOG))
        initialize(same.backbone if "prefix" in options else same, init_cfg)
        saved = weights_of(load_file(path))
        assert all(torch.equal(value, saved[name]) for name, value in same.state_dict().items())
    with pytest.raises(InputError, match="other mixers"):
        mmengine.runner.load_checkpoint(Wrapped(build()), path)
    plain = write(Wrapped(build()), tmp_path / f"plain{suffix}")
    mmengine.runner.load_checkpoint(Wrapped(build(HEDGEHOG)), plain)
    with pytest.raises(InputError, match=r"plain\.\w+' has no weight of this model"):
        mmengine.runner.load_checkpoint(Wrapped(torch.nn.Linear(2, 2)), plain)


def test_backbones_take_weights_by_init_cfg(tmp_path):
    """As by `checkpoint`; the prefix of the file does not matter."""
    student = build(HEDGEHOG)
    with torch.no_grad():
        student.blocks[2].attn.mixer.query_map.mul_(3)
    path = write(Wrapped(student), tmp_path / "x.pth")
    init_cfg = dict(type="Pretrained", checkpoint=path)
    backbone = TerrazzoBackbone(NAME, out_indices=(5,), convert=HEDGEHOG, init_cfg=init_cfg)
    backbone.init_weights()
    assert torch.equal(backbone.model.blocks[2].attn.mixer.query_map, student.blocks[2].attn.mixer.query_map)
    assert torch.equal(backbone.model.cls_token, student.cls_token)
    with pytest.raises(InputError, match="other mixers"):
        TerrazzoBackbone(NAME, out_indices=(5,), init_cfg=init_cfg)
    with pytest.raises(InputError, match="checkpoint and init_cfg both name weights"):
        TerrazzoBackbone(NAME, out_indices=(5,), convert=HEDGEHOG, checkpoint=path, init_cfg=init_cfg)


def test_models_that_cannot_have_mixers(tmp_path):
    """The teacher of `TokenBudget` is a family's own ViT: it takes plain weights, and no student's."""
    student = timm.create_model("deit_tiny_patch16_224", num_classes=7)
    plain, path = write(student, tmp_path / "plain.pth"), tmp_path / "student.pth"
    write(terrazzo.convert_attention(student, "hedgehog", layers=[1]), path)
    settings = dict(name="asvit_deit_tiny", num_classes=7)
    Classifier(settings, recipe=dict(type="TokenBudget", budget=0.5, teacher=plain))
    reason = (
        r"student.pth' is of a model with convert=dict\(mixer='hedgehog', layers=\[1\]\), and a .* cannot have mixers"
    )
    with pytest.raises(InputError, match=reason) as refusal:
        Classifier(settings, recipe=dict(type="TokenBudget", budget=0.5, teacher=str(path)))
    assert "\n" not in str(refusal.value)
    # A model with mixers of its own fits by its tensors.
    record = {"convert": [{"mixer": "hedgehog", "options": {}, "layers": [0]}]}
    check_changes(timm.create_model("mixer_vit_tiny", mixer="hedgehog", device="meta"), record, "x.pth", arguments)
