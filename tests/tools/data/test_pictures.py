"""Pictures of other depths and orientations: each command reads them like a plain picture."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from terrazzo import _pictures
from terrazzo.errors import InputError
from terrazzo.tools.data.pictures import find_pictures
from terrazzo.tools.export.precision import lowering as lowered_export
from terrazzo.tools.verbs import export

pytestmark = pytest.mark.filterwarnings("ignore::terrazzo._pictures.PictureWarning")

SIZE = (64, 96)
GREY = (np.arange(64)[:, None] * 2 + np.arange(96)[None]).astype(np.uint8)


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """A grey scene: plain, with 16 bits, as floats, and rotated with an EXIF orientation."""
    monkeypatch.setattr(_pictures, "_noted", set())
    folder = tmp_path / "scene"
    folder.mkdir()
    wide = GREY.astype(np.uint16) * 257
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(GREY).save(folder / "plain.png")
    Image.fromarray(wide).save(folder / "wide.png")
    Image.fromarray(wide).save(folder / "wide_tiff.tif")
    Image.fromarray((GREY / 255).astype(np.float32)).save(folder / "floats.tif")
    Image.fromarray(np.rot90(GREY)).save(folder / "sideways.png", exif=exif)
    Image.fromarray(np.rot90(wide)).save(folder / "sideways_wide.tif", exif=exif)
    return folder


@pytest.mark.long
def test_infer_sees_one_scene(run, trained, scene, tmp_path):
    """The pipeline of a config reads the pictures; one line says how floats were converted."""
    config, checkpoint = trained
    result = run("infer", config, scene, "--checkpoint", checkpoint, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (note,) = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert note == f"note: pictures of floats from 0 to 1 are scaled by 255; the first is {scene / 'floats.tif'}"
    plain = np.asarray(Image.open(tmp_path / "out" / "plain.labels.png"))
    assert plain.shape == SIZE
    for picture in find_pictures([scene]):
        assert np.array_equal(Image.open(tmp_path / "out" / f"{picture.name}.labels.png"), plain), picture.name


def test_calibration_sees_one_scene(scene):
    """`export --int8 --pictures` calibrates on these pictures."""
    ready = SimpleNamespace(config=None, size=SIZE, task="classification")
    samples = lowered_export.evidence(ready, "int8", scene).samples
    assert len(samples) == 6
    for (sample,) in samples:
        assert np.array_equal(sample[0, 0], GREY)


@pytest.mark.parametrize("name", ["plain.png", "wide.png", "floats.tif", "sideways.png", "sideways_wide.tif"])
def test_export_compares_on_the_scene(run, scene, monkeypatch, name):
    """`export --image` compares on this picture."""
    seen = []

    def photo(picture, *rest):
        seen.append(np.asarray(picture)[..., 0])
        raise InputError("seen")

    monkeypatch.setattr(export, "photo", photo)
    assert "seen" in run("export", "resnet10t", "--size", *SIZE, "--image", scene / name).stderr
    assert np.array_equal(seen, [GREY])


def test_export_refuses_a_picture_of_an_unknown_range(refused, tmp_path):
    path = tmp_path / "scan.tif"
    Image.fromarray(GREY.astype(np.float32) * 100).save(path)
    for arguments in (("export", "resnet10t", "--image"), ("infer", "resnet10t", "--out", tmp_path)):
        assert "scan.tif holds floats from 0 to" in refused(*arguments, path)


def test_the_metric_of_a_file_sees_one_scene(scene):
    """`export --fp16` and `--int8` with a config measure the file on its test data."""
    from mmengine.config import Config

    from terrazzo.tools.export.precision.file_metric import FileMetric

    dataset = dict(type="ImageFolderDataset", data_root=str(scene.parent.parent), split=scene.parent.name)
    dataset["transform"] = dict(input_size=32, is_training=False)
    evaluator = dict(type="ClassificationAccuracy")
    cfg = Config(dict(model=dict(type="Classifier"), test_dataloader=dict(dataset=dataset), test_evaluator=evaluator))

    class Predictor:
        def results(self, image):
            assert np.array_equal(np.asarray(image)[..., 0], GREY)
            return {"scores": torch.tensor([1.0, 0.0])}

    assert FileMetric(cfg)(Predictor()) == {"accuracy/top1": 100}


@pytest.mark.parametrize(
    "loading",
    [
        dict(type="LoadImageFromFile", color_type="unchanged"),
        dict(type="LoadImageFromFile", color_type="color_ignore_orientation"),
        dict(type="mmcv.LoadImageFromFile", imdecode_backend="tifffile"),
        dict(type="mmdet.LoadMultiChannelImageFromFiles"),
    ],
    ids=["unchanged", "sideways", "tifffile", "channels"],
)
def test_infer_refuses_pipelines_that_read_otherwise(loading):
    from terrazzo.tools.predict.openmmlab import _Prepare

    with pytest.raises(InputError, match=r"reads pictures with .*, but infer reads them upright and in colour"):
        _Prepare([loading])
    _Prepare([dict(type="LoadImageFromFile", backend_args=None), dict(type="LoadAnnotations")])
