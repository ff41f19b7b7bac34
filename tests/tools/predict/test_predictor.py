"""`terrazzo.Predictor` gives the records of `terrazzo infer`, for every kind of picture, alone and in batches."""

import json
import warnings

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import terrazzo
from terrazzo.errors import InputError
from terrazzo.tools.data.floors import FloorMaker


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures of two sizes."""
    folder, maker = tmp_path_factory.mktemp("pictures"), FloorMaker(seed=3, size=64)
    for number in range(3):
        image = Image.fromarray(maker.make().image)
        image.crop((0, 0, 64, 64 if number % 2 else 48)).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def equal(one: dict, other: dict) -> bool:
    """Whether records agree, numbers to rounding."""
    return json.loads(json.dumps(one), parse_float=lambda text: round(float(text), 3)) == json.loads(
        json.dumps(other), parse_float=lambda text: round(float(text), 3)
    )


@pytest.mark.long
@pytest.mark.parametrize("kind", ["trained", "detector"])
def test_configs_give_the_records_of_infer(run, request, kind, pictures, tmp_path):
    config, checkpoint = request.getfixturevalue(kind)
    result = run("infer", config, *pictures, "--checkpoint", checkpoint, "--out", tmp_path, "--min-score", 0)
    assert result.exit_code == 0, result.output
    records = [json.loads((tmp_path / f"{path.stem}.json").read_text()) for path in pictures]
    predictor = terrazzo.Predictor(config, checkpoint, device="cpu", min_score=0)
    alone = [predictor(path) for path in pictures]
    assert [prediction.record for prediction in alone] == records
    together = predictor(pictures, batch=3)
    assert all(equal(prediction.record, record) for prediction, record in zip(together, records, strict=True))
    assert all(np.array_equal(one.labels, other.labels) for one, other in zip(alone, together) if kind == "trained")
    assert alone[0].drawing.width == 64


@pytest.mark.long
def test_timm_models_by_name_and_in_memory(run, pictures, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    weights = ("--checkpoint", tmp_path / "weights.pth", "--num-classes", 4)
    result = run("infer", "resnet10t", *pictures, *weights, "--out", tmp_path / "out", "--batch", 4)
    assert result.exit_code == 0, result.output
    records = [json.loads((tmp_path / "out" / f"{path.stem}.json").read_text()) for path in pictures]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = terrazzo.Predictor("resnet10t", tmp_path / "weights.pth", num_classes=4, device="cpu")
    inside = terrazzo.Predictor(model, device="cpu")
    for predictor in (named, inside):
        found = predictor([str(path) for path in pictures], batch=2)
        assert all(equal(prediction.record, record) for prediction, record in zip(found, records, strict=True))
    image = Image.open(pictures[0])
    array = np.asarray(image.convert("RGB"))
    wanted = named(pictures[0]).record
    for item, path in ((image, str(pictures[0])), (image.convert("RGB"), None), (array, None)):
        assert named(item).record == wanted | {"picture": path}
    batch = named(np.stack([array, array]))
    assert [prediction.record["top"] for prediction in batch] == [named(array).record["top"]] * 2
    assert named(np.zeros((20, 30), np.uint8)).record["width"] == 30
    assert list(named.stream(iter([]))) == []


def test_random_weights_are_noted():
    with pytest.warns(UserWarning, match="resnet10t has random weights"):
        terrazzo.Predictor("resnet10t", device="cpu")


@pytest.mark.filterwarnings("ignore:.*random weights")
@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("nowhere.png", "does not exist"),
        (np.zeros((4, 4, 3), np.float32), "give .H, W, 3. of uint8"),
        (np.zeros((4, 4, 2), np.uint8), "give .H, W, 3. of uint8"),
        (np.zeros((0, 4, 3), np.uint8), "has no pixels"),
        (7, "a int is not a picture"),
        (torch.zeros(2, 3, 4, 4), "a Tensor is not a picture"),
    ],
)
def test_no_pictures(item, words):
    predictor = terrazzo.Predictor("resnet10t", device="cpu")
    with pytest.raises(InputError, match=words):
        predictor(item)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "resnet10"}, "did you mean resnet10t"),
        ({"model": "fpn_dinat-mini_floors"}, "needs weights"),
        ({"model": "fpn_dinat-mini_floors", "pretrained": True}, "are for timm models"),
        ({"model": torch.nn.Linear(1, 1)}, "is not a model of timm"),
        ({"model": 7}, "neither a model nor a config"),
        ({"model": "none.onnx", "runtime": "onnx"}, "does not exist"),
        ({"model": "none.onnx", "runtime": "onnx", "device": "cpu"}, "leave the other options out"),
        ({"model": "resnet10t", "runtime": "caffe"}, "choose one of torch, onnx"),
        ({"model": "resnet10t", "min_score": 2}, "from 0 to 1"),
        ({"model": "resnet10t", "device": "warp"}, "warp"),
    ],
)
def test_refusals(arguments, words):
    with pytest.raises(InputError, match=words):
        terrazzo.Predictor(**arguments)
