"""`terrazzo explain --convert`: the plan's table beside the FLOPs that each layer saves."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import terrazzo
from terrazzo._pictures import spread
from terrazzo.tools.data.pictures import find_pictures
from terrazzo.tools.inspect.conversion import Prepared, load_student

NAME = "test_vit"  # 10 x 10 patches of 16 pixels and a class token; 6 layers


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(4):
        noise = np.random.default_rng(index).integers(0, 255, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((180, 170)).save(folder / f"{index}.png")
    return folder


def sharp(**options):
    """A model whose attention is far from uniform."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, **options).eval()
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            block.attn.qkv.weight.mul_(8 + 4 * layer)
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "plain.pth"
    torch.save(sharp().state_dict(), path)
    return path


def student(layers):
    model = terrazzo.convert_attention(sharp(), "hedgehog", layers=layers)
    with torch.no_grad():
        for layer in layers:
            model.blocks[layer].attn.mixer.query_map.mul_(0.4)
    return model


def images(pictures, model, batch=2):
    config = timm.data.resolve_model_data_config(model)
    return Prepared(find_pictures([pictures]), (160, 160), config, batch, lambda count: None)


@pytest.fixture
def facts(run, pictures, weights):
    def invoke(*arguments, checkpoint=weights):
        common = ("--convert", "hedgehog", "--pictures", pictures, "--device", "cpu", "--json")
        result = run("explain", NAME, "--checkpoint", checkpoint, *common, *arguments)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return invoke


@pytest.mark.long
def test_facts_are_the_plan_and_the_counts(run, facts, pictures):
    found = facts("--budget", 2, "--batch", 2)
    model = sharp()
    plan = terrazzo.conversion_plan(model, "hedgehog", images(pictures, model), budget=2)
    assert [row["layer"] for row in found["layers"]] == [row.layer for row in plan.rows]
    assert found["chosen"] == list(plan.layers)
    assert found["pictures"] == 4
    assert found["divergence_of"] == "logits"
    for row, wanted in zip(found["layers"], plan.rows):
        for key in ("divergence", "attention_error", "prefix_error", "token_error", "token_cosine"):
            assert row[key] == pytest.approx(getattr(wanted, key), rel=1e-4)
        assert row["cumulative"] == (wanted.cumulative and pytest.approx(wanted.cumulative, rel=1e-4))

    def macs(*changes):
        return json.loads(run("info", NAME, *changes, "--json").stdout)["macs"]

    assert found["flops"] == 2 * macs()
    for row in found["layers"]:
        assert row["flops_saved"] == 2 * (macs() - macs("--mixer", "hedgehog", "--mixer-layers", row["layer"]))
    both = ",".join(map(str, found["chosen"]))
    assert found["chosen_flops_saved"] == 2 * (macs() - macs("--mixer", "hedgehog", "--mixer-layers", both))


@pytest.mark.long
def test_table(run, weights, pictures):
    common = ("--checkpoint", weights, "--pictures", pictures, "--device", "cpu")
    result = run("explain", NAME, "--convert", "na,kernel=3", *common, "--count", 3, "--size", 96, 128, "--max-kl", 99)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "test_vit, 1x3x96x128, float32, on cpu"
    assert lines[1] == "na,kernel=3 in place of attention, measured on 3 pictures"
    assert lines[2] == "na mixes 6 x 8 patches in blocks.0-5.attn"
    assert lines[3].startswith("layer")
    assert lines[3].endswith("final cosine  MFLOPs saved  % of the model")
    assert sorted(int(line.split()[0]) for line in lines[4:10]) == list(range(6))
    assert "--mixer na,kernel=3 --mixer-layers 0,1,2,3,4,5 saves" in lines[-1]
    within = run("explain", NAME, "--convert", "hedgehog", *common, "--count", 1, "--max-kl", 0)
    assert "No layer is within the limits." in within.stdout


@pytest.mark.long
@pytest.mark.parametrize("layers", [[0, 1, 2, 3, 4, 5], [1, 4]])
def test_a_student(facts, tmp_path, pictures, layers):
    """A checkpoint says what to convert; its mixers' weights are measured, and the model itself is the teacher."""
    model, path = student(layers), tmp_path / "student.pth"
    torch.save({"state_dict": model.state_dict(), "meta": {"terrazzo.changes": model.changes}}, path)
    rows = {row["layer"]: row for row in facts("--greedy", "--budget", 1, checkpoint=path)["layers"]}
    wanted = terrazzo.conversion_plan(model, "hedgehog", images(pictures, model))
    fresh = terrazzo.conversion_plan(sharp(), "hedgehog", images(pictures, model))
    assert rows.keys() == set(range(6))
    for row in wanted.rows:
        assert rows[row.layer]["divergence"] == pytest.approx(row.divergence, rel=1e-3)
    for row in fresh.rows:
        kept = row.layer in layers
        assert (rows[row.layer]["attention_error"] == pytest.approx(row.attention_error, rel=1e-3)) != kept


@pytest.mark.long
def test_a_student_with_its_teacher(facts, tmp_path, weights, pictures):
    model, path = student([0, 1, 2, 3, 4, 5]), tmp_path / "student.pth"
    with torch.no_grad():
        model.blocks[2].attn.proj.weight.mul_(1.5)
    torch.save({"state_dict": model.state_dict(), "meta": {"terrazzo.changes": model.changes}}, path)
    found = facts("--teacher", weights, checkpoint=path)
    plan = terrazzo.conversion_plan(model, "hedgehog", images(pictures, model), teacher=sharp())
    assert [row["layer"] for row in found["layers"]] == list(plan.layers)
    assert found["layers"][0]["divergence"] == pytest.approx(plan.rows[0].divergence, rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_chosen_layers_are_written(run, facts, tmp_path, weights, suffix):
    """A student of all layers becomes a model with two, the others with the teacher's attention."""
    model, path, out = student([0, 1, 2, 3, 4, 5]), tmp_path / "student.pth", tmp_path / "new" / f"two{suffix}"
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.mul_(1.5)
    torch.save({"state_dict": model.state_dict(), "meta": {"terrazzo.changes": model.changes}}, path)
    chosen = facts("--teacher", weights, "--budget", 2, "--count", 1, "--save", out, checkpoint=path)["chosen"]
    saved = load_student(NAME, out, (160, 160), None)
    assert sorted(saved.conversion) == sorted(chosen)
    teacher = sharp()
    for layer, block in enumerate(saved.blocks):
        of = model if layer in chosen else teacher
        assert torch.equal(block.attn.proj.weight, of.blocks[layer].attn.proj.weight)


def test_pictures_are_spread(pictures):
    found = find_pictures([pictures])
    assert [picture.name for picture in spread(found, 2)] == ["0", "2"]
    assert spread(found, 9) == found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--count", 3), "--count belongs to --convert NAME"),
        (("--max-kl", 1.0), "--max-kl belongs to --convert NAME"),
        (("--pictures", "x"), "--pictures belongs to --convert NAME"),
        (("--convert", "hedgehog"), "--convert measures on pictures"),
        (("--convert", "hedgehog", "--pictures", "nowhere"), "nowhere does not exist"),
        (("--convert", "hedghog", "--pictures", "PICTURES"), "mixer must be one of"),
        (("--convert", "hedgehog,topk", "--pictures", "PICTURES"), "mixer must be one of"),
        (("--convert", "hedgehog,topk=3", "--pictures", "PICTURES"), "'hedgehog' has no options, got topk"),
        (("--convert", "softmax", "--pictures", "PICTURES"), "'softmax' replaces nothing"),
        (("--convert", "llsa", "--pictures", "PICTURES"), "computes softmax attention on images so small"),
        (("--convert", "hedgehog", "--pictures", "PICTURES", "--budget", 7), "budget must be 1 to 6"),
        (
            ("--convert", "hedgehog", "--pictures", "PICTURES", "--save", "x.pth"),
            "--save writes a model with the chosen",
        ),
        (
            ("--convert", "hedgehog", "--pictures", "PICTURES", "--save", "x.onnx", "--budget", 2),
            "x.onnx ends in neither",
        ),
        (("--convert", "hedgehog", "--pictures", "PICTURES", "--size", 100, 160), "cannot take 100x160 images"),
        (("--convert", "hedgehog", "--pictures", "PICTURES", "--checkpoint", "no.pth"), "no.pth"),
        (("--convert", "hedgehog", "--pictures", "PICTURES", "--reduce", "mctf,r=8"), "plan first"),
    ],
)
def test_refusals(refused, pictures, arguments, words):
    given = [pictures if value == "PICTURES" else value for value in arguments]
    assert words in refused("explain", NAME, *given, "--device", "cpu")


def test_other_checkpoints_are_refused(refused, pictures, tmp_path):
    """A model that drops tokens, a record that does not fit the model, and a mixer beside which nothing is left."""
    common = ("--convert", "hedgehog", "--pictures", pictures, "--device", "cpu", "--checkpoint")
    reduced = terrazzo.reduce(sharp(), r=4, criteria=(1, 0, 40))
    other = terrazzo.convert_attention(sharp(), "linear_infsa")
    far = {"convert": [{"mixer": "hedgehog", "options": {}, "layers": [9]}]}
    for model, record, words in (
        (reduced, reduced.changes, "is of a model that merges or drops tokens"),
        (other, other.changes, "every layer has another mixer"),
        (student([1]), far, "layers must be some of 0 to 5"),
    ):
        torch.save({"state_dict": model.state_dict(), "meta": {"terrazzo.changes": record}}, tmp_path / "x.pth")
        assert words in refused("explain", NAME, *common, tmp_path / "x.pth")
