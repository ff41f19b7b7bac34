"""--mixer and --reduce of the verbs about one model: `info`, `explain`, `infer` and `export`."""

import json

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image

import terrazzo

NAME = "test_vit"  # 10 x 10 patches of 16 pixels and a class token


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "plain.pth"
    torch.save(timm.create_model(NAME).state_dict(), path)
    return path


def facts_of(run, verb, *arguments):
    result = run(verb, NAME, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.long
def test_info(run):
    plain = facts_of(run, "info")
    changed = facts_of(run, "info", "--mixer", "hedgehog", "--mixer-layers", "0,2")
    heads, dim = 2, 32
    assert changed["params"] - plain["params"] == 2 * 2 * heads * dim * dim
    assert changed["changes"] == ["hedgehog,layers=(0,2)"]
    assert "changed by     hedgehog" in run("info", NAME, "--mixer", "hedgehog").stdout


@pytest.mark.long
def test_explain_says_what_a_layer_computes(run):
    """On 10 x 10 patches a window of 11 is the whole map; on 12 x 8 patches it is not."""
    chosen = ("--mixer", "na", "--mixer-option", "kernel=11", "--mixer-layers", "1,2", "--device", "cpu")
    calls = facts_of(run, "explain", *chosen)["mixers"]
    assert [(call["layer"], call["mixer"], call["options"], call["grid"]) for call in calls] == [
        (f"blocks.{i}.attn", "na", {"kernel": 11}, [10, 10]) for i in (1, 2)
    ]
    assert {call["softmax"] for call in calls} == {"windows of 11 reach both sides of the map"}
    said = run("explain", NAME, *chosen).stdout
    assert (
        "na computes softmax attention, because windows of 11 reach both sides of the map, on 10 x 10 patches in "
        "blocks.1-2.attn\n"
    ) in said
    assert "na mixes 12 x 8 patches in blocks.1-2.attn\n" in run("explain", NAME, *chosen, "--size", 192, 128).stdout


def test_explain_of_merged_tokens(run):
    reduced = ("--reduce", "mctf,r=8,criteria=(1,0,40),blocks=(3,)")
    calls = facts_of(run, "explain", "--mixer", "hedgehog", *reduced, "--device", "cpu")["mixers"]
    assert [call["grid"] for call in calls] == [[10, 10]] * 3 + [None] * (len(calls) - 3)


def test_infer(run, weights, tmp_path):
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / "one.png")
    arguments = (tmp_path / "one.png", "--checkpoint", weights, "--device", "cpu", "--out", tmp_path / "out")
    records = []
    for changes in ((), ("--mixer", "hedgehog"), ("--mixer", "softmax")):
        result = run("infer", NAME, *arguments, *changes)
        assert result.exit_code == 0, result.output
        records.append(json.loads((tmp_path / "out" / "one.json").read_text())["top"])
    assert records[0] == records[2] != records[1]


@pytest.mark.long
def test_export(run, tmp_path):
    """The file has open height and width; a checkpoint may have what the mixer adds."""
    torch.manual_seed(0)
    model = terrazzo.convert_attention(timm.create_model(NAME, dynamic_img_size=True, dynamic_img_pad=True), "hedgehog")
    for name, parameter in model.named_parameters():
        if "mixer" in name:
            torch.nn.init.normal_(parameter)
    checkpoint, path = tmp_path / "trained.pth", tmp_path / "model.onnx"
    torch.save(model.state_dict(), checkpoint)
    result = run("export", NAME, "--checkpoint", checkpoint, "--mixer", "hedgehog", "--dynamic", "hw", "--out", path)
    assert result.exit_code == 0, result.output
    image = 255 * torch.rand(1, 3, 96, 150)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        wanted = model.eval()((image / 255 - mean) / std).numpy()
    found = onnxruntime.InferenceSession(path).run(None, {"image": image.numpy()})[0]
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.long
def test_a_checkpoint_says_which_mixer_it_needs(run, refused, tmp_path):
    """Also after `terrazzo convert`, which keeps the record."""
    model = terrazzo.convert_attention(timm.create_model(NAME), "hedgehog", layers=[0, 2])
    content = {"state_dict": model.state_dict(), "meta": {"epoch": 1, "terrazzo.changes": model.changes}}
    trained, slim = tmp_path / "trained.pth", tmp_path / "slim.safetensors"
    torch.save(content, trained)
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / "one.png")
    assert run("convert", trained, slim).exit_code == 0
    assert run("convert", slim, tmp_path / "back.pth").exit_code == 0
    assert torch.load(tmp_path / "back.pth", weights_only=True)["meta"] == {"terrazzo.changes": model.changes}
    wanted = "pass --mixer 'hedgehog,layers=(0,2)'"
    for checkpoint in (trained, slim):
        infer = ("infer", NAME, tmp_path / "one.png", "--checkpoint", checkpoint, "--out", tmp_path / "out")
        assert wanted in refused(*infer)
        assert wanted in refused(*infer, "--mixer", "hedgehog")
        assert wanted in refused("export", NAME, checkpoint, "--out", tmp_path / "model.onnx")
        assert not (tmp_path / "out").exists()
    done = run(*infer, "--mixer", "hedgehog,layers=(0,2)", "--device", "cpu")
    assert done.exit_code == 0, done.output
    exported = run("export", NAME, slim, "--mixer", "hedgehog,layers=(0,2)", "--out", tmp_path / "model.onnx")
    assert exported.exit_code == 0, exported.output
    facts = onnxruntime.InferenceSession(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(facts["terrazzo.changes"]) == model.changes


@pytest.mark.parametrize("verb", ["info", "explain"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--mixer", "hedghog"), "hedghog: mixer must be one of"),
        (("--mixer", "hedgehog", "--mixer-layers", "0,99"), "layers must be some of 0 to"),
        (("--mixer", "hedgehog", "--mixer-layers", "0-3"), "--mixer-layers takes numbers of layers such as 0,1,5"),
        (("--mixer-layers", "0"), "name a mixer with --mixer NAME"),
        (("--mixer", "hedgehog", "--mixer-option", "topk=3"), "'hedgehog' has no options, got topk"),
        (("--reduce", "mctf,r=-1"), "r must be a part below 1"),
    ],
)
def test_refusals(refused, verb, options, words):
    assert words in refused(verb, NAME, *options)


def test_other_models_are_refused(refused):
    assert "only timm's plain VisionTransformer and Eva can be converted" in refused(
        "info", "resnet10t", "--mixer", "hedgehog"
    )


def test_configs_say_it_themselves(refused, tmp_path):
    pytest.importorskip("mmengine", reason="needs the extra 'openmmlab'")
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    config = "fpn_dinat-mini_floors"
    for verb in (("infer", config, tmp_path / "one.png", "--checkpoint", "x.pth"), ("export", config, "x.pth")):
        assert "write convert=dict(mixer=...)" in refused(*verb, "--mixer", "hedgehog")


def test_one_checkpoint(refused, weights):
    assert "name the same thing" in refused("export", NAME, weights, "--checkpoint", weights)
