"""ultralytics: YOLO's neck and head on a backbone, through a model file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.ecosystem import equal, leaves, step
from support.seeded import image

from terrazzo.errors import InputError
from terrazzo.integrations.ultralytics import model_file, register

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ultralytics(tmp_path_factory):
    """The package, without its network: it would install packages and check for new versions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("ultralytics")))
        patch.setenv("YOLO_AUTOINSTALL", "false")
        patch.setenv("YOLO_OFFLINE", "true")
        yield pytest.importorskip("ultralytics", reason="needs the extra 'ecosystem'")


def yolo(ultralytics, name: str, folder: Path):
    register()
    file = folder / f"yolo_{name}.yaml"
    file.write_text(model_file(name, classes=3))
    return ultralytics.YOLO(file, task="detect")


@pytest.mark.parametrize("name", ["s2aformer_mini", "dinat_mini"])
def test_steps_reloads_and_exports(name, ultralytics, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    torch.manual_seed(0)
    model, x = yolo(ultralytics, name, tmp_path), image((64, 96), batch=2).sigmoid()
    assert model.model.stride.tolist() == [8, 16, 32]
    model.model.args = ultralytics.cfg.get_cfg()
    batch = {
        "img": x,
        "batch_idx": torch.tensor([0.0, 1.0]),
        "cls": torch.tensor([[0.0], [2.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.6], [0.3, 0.4, 0.4, 0.4]]),
    }
    model.model.train()
    loss, _ = model.model.loss(batch)
    step(loss.sum(), model.model.model[0])

    model.model.half().float().eval()  # ultralytics stores weights in half precision
    model.save(tmp_path / "trained.pt")
    again = ultralytics.YOLO(tmp_path / "trained.pt")
    with torch.no_grad():
        wanted = leaves(model.model(x))
        again.model.float().eval()
        assert equal(leaves(again.model(x)), wanted)

    file = again.export(format="onnx", imgsz=(64, 96), simplify=False, device="cpu")
    (found,) = runtime.InferenceSession(file).run(None, {"images": x[:1].numpy()})
    np.testing.assert_allclose(found, wanted[0][:1].numpy(), rtol=1e-4, atol=1e-3)  # boxes are in pixels


def test_trains_validates_and_predicts(ultralytics, tmp_path):
    """A whole training: the copy with averaged weights, validation, the stripped file, a prediction from it."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "labels" / f"{number}.txt").write_text(f"{number % 3} 0.5 0.5 0.4 0.4\n")
    (tmp_path / "data.yaml").write_text(f"path: {tmp_path}\ntrain: images\nval: images\nnames: [a, b, c]\n")
    quick = dict(epochs=1, imgsz=64, batch=2, workers=0, device="cpu", plots=False, verbose=False, pretrained=False)
    yolo(ultralytics, "s2aformer_mini", tmp_path).train(
        data=tmp_path / "data.yaml", project=str(tmp_path), name="run", **quick
    )
    trained = ultralytics.YOLO(tmp_path / "run" / "weights" / "best.pt")
    assert trained.names == {0: "a", 1: "b", 2: "c"}
    (result,) = trained.predict(np.zeros((50, 70, 3), np.uint8), imgsz=64, device="cpu", verbose=False)
    assert result.orig_shape == (50, 70)


def test_the_example_in_the_documents_is_this_model_file():
    page = (Path(__file__).parents[2] / "docs" / "ecosystem.md").read_text()
    assert model_file("dinat_mini", classes=3, pretrained=True) in page


def test_refuses_a_model_without_a_pyramid():
    with pytest.raises(InputError, match=r"reads maps of strides 8, 16, 32, and roma_tiny has \[16"):
        model_file("roma_tiny")
