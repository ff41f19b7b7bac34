"""Restored pictures: alone, in tiles, from exported files, and beside the truth."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support.restoration import SMALL, TINY, write_pictures

import terrazzo
from terrazzo.degradations.bicubic import enlarged, reduced
from terrazzo.degradations.pixels import to_image, to_pixels
from terrazzo.degradations.quality import quality
from terrazzo.errors import InputError
from terrazzo.tools.data.windows import WholePicture
from terrazzo.tools.predict.output import write_prediction
from terrazzo.tools.predict.prediction import Prediction
from terrazzo.tools.predict.restorers import RestorePredictor
from terrazzo.tools.predict.tiles.engine import tile_engine
from terrazzo.tools.predict.tiles.output import write_tiled
from terrazzo.tools.predict.tokens import TokenWatch


def silent(done, total):
    pass


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model(TINY, scale=2).eval()


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    folder = write_pictures(tmp_path_factory.mktemp("pictures"), (75, 61)) / "images" / "val"
    return folder / "0.png"


@pytest.fixture(scope="module")
def whole(network, picture):
    """The restored picture, as an array."""
    with torch.no_grad():
        return np.asarray(to_image(network(to_pixels(Image.open(picture))[None])[0]))


def test_a_picture_is_restored(network, picture, whole):
    prediction = terrazzo.Predictor(network, device="cpu")(picture)
    assert np.array_equal(np.asarray(prediction.restored), whole)
    assert prediction.record == {
        **{"picture": str(picture), "width": 75, "height": 61},
        **{"task": "restoration", "scale": 2, "restored": {"width": 150, "height": 122}},
    }
    assert prediction.drawing.width > 300


@pytest.mark.parametrize("overlap", ["auto", "blend", None, 8])
@pytest.mark.parametrize("tile", [32, 80])
def test_tiles(network, picture, whole, overlap, tile):
    """Two 3x3 convolutions look 2 pixels far: all of these overlaps are exact, and so is a blend of equal values."""
    predictor = terrazzo.Predictor(network, device="cpu", tile=tile, overlap=overlap)
    prediction = predictor(picture, batch=2)
    difference = np.abs(np.asarray(prediction.restored).astype(int) - whole)
    seam = (
        3 if tile == 32 and overlap in ("blend", None) else 0
    )  # a ramp reaches to the edge of a tile, which is padded
    assert prediction.restored.size == (150, 122)
    assert (difference > 1).mean() < 0.2 if seam else difference.max() <= 1
    facts = prediction.record["tiles"]
    if tile == 80:
        assert facts == {"how": "whole"}
    else:
        assert facts["how"] == {"auto": "exact", 8: "hard"}.get(overlap, "blend")
        assert ("disagreement" in facts) == (facts["how"] == "blend")
        assert facts["overlap"] == (6 if overlap == "auto" else 8)  # the measure counts the frame, too


class MeanColour(torch.nn.Module):
    """Twice the size, all of it in the mean colour of what the network sees: no two tiles agree."""

    upscale = 2

    def forward(self, x):
        return x.mean((2, 3), keepdim=True).expand(-1, -1, 2 * x.shape[2], 2 * x.shape[3])


def test_a_blend_by_hand():
    """Two tiles that share 8 of 56 columns, which are 16 columns at twice the size: a ramp from one to the other."""
    pixels = np.zeros((24, 56, 3), np.uint8)
    pixels[:, 28:] = (80, 160, 240)
    left, right = pixels[:, :32].mean((0, 1)), pixels[:, 24:].mean((0, 1))
    share = np.concatenate([np.zeros(48), (np.arange(16) + 0.5) / 16, np.ones(48)])[:, None]
    found = terrazzo.Predictor(MeanColour(), device="cpu", tile=32, overlap="blend")(pixels).restored
    assert found.size == (112, 48)
    assert np.abs(np.asarray(found) - (left * (1 - share) + right * share)).max() <= 0.51


def test_tiles_that_share_nothing_have_seams(network, picture, whole):
    restored = np.asarray(terrazzo.Predictor(network, device="cpu", tile=32, overlap=0)(picture).restored)
    differing = np.flatnonzero((restored != whole)[:40].any((0, 2)))  # above the first seam of rows
    assert len(differing)
    assert differing.min() >= 2 * (32 - 2)


def test_exact_tiles_of_a_u_shape():
    """The encoder's stride decides where tiles begin; a picture is reflected as the restorer does it."""
    pytest.importorskip("mmengine", reason="needs the extra 'openmmlab'")
    from terrazzo.openmmlab import Restorer

    torch.manual_seed(0)
    backbone = dict(SMALL, out_indices=(1,))
    model = Restorer(backbone, dict(type="RestorerUNet", channels=4)).eval()
    torch.nn.init.normal_(model.neck.last[0].weight, std=0.05)
    engine = RestorePredictor(model, torch.device("cpu"), stride=model.neck.stride)
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 255, (141, 203, 3), dtype=np.uint8))
    (expected,) = engine.predict([image])
    tiles = tile_engine(engine, 128, "auto")
    found = tiles.predict(WholePicture("noise", image), 2, silent)
    assert found.record["tiles"]["how"] == "exact"
    assert np.abs(np.asarray(found.restored).astype(int) - np.asarray(expected.restored)).max() <= 1
    with pytest.raises(InputError, match="no overlap of tiles of 16 pixels is exact"):
        tile_engine(engine, 16, "auto")
    with pytest.raises(InputError, match="multiples of the model's stride, 4: use --tile 20"):
        tile_engine(engine, 19, "auto")


@pytest.mark.parametrize("tile", [None, 32])
def test_degraded_pictures_are_compared_with_the_truth(network, picture, tile):
    """61 rows are 60 in multiples of the scale; figures before are bicubic's."""
    prediction = terrazzo.Predictor(network, device="cpu", degrade=True, tile=tile)(picture)
    truth = to_pixels(Image.open(picture))[:, :60, :74]
    small = to_pixels(to_image(reduced(truth, 2)))
    record = prediction.record
    assert (record["width"], record["height"], record["degradation"]) == (75, 61, "super-resolution")
    assert prediction.restored.size == (74, 60)
    before = quality(to_pixels(to_image(enlarged(small, 2))), truth, 2)
    after = quality(to_pixels(prediction.restored), truth, 2)
    assert record["before"] == pytest.approx(before, abs=1e-3)
    assert record["after"] == pytest.approx(after, abs=1e-3)
    assert prediction.drawing.width > 3 * 74


def test_pictures_larger_than_memory(network, tmp_path):
    rasterio = pytest.importorskip("rasterio", reason="needs the extra 'huge'")
    from terrazzo.tools.data.pictures import Picture

    pixels = np.random.default_rng(0).integers(0, 255, (61, 75, 3), dtype=np.uint8)
    place = rasterio.Affine(10, 0, 500, 0, -10, 900)
    options = dict(driver="GTiff", width=75, height=61, count=3, dtype="uint8", crs="EPSG:3857", transform=place)
    with rasterio.open(tmp_path / "large.tif", "w", **options) as file:
        file.write(pixels.transpose(2, 0, 1))
    tiles = tile_engine(RestorePredictor(network, torch.device("cpu")), 32, 8)
    record = write_tiled(tmp_path / "out", Picture(tmp_path / "large.tif", "large"), tiles, 2, silent)
    (expected,) = RestorePredictor(network, torch.device("cpu")).predict([Image.fromarray(pixels)])
    with rasterio.open(tmp_path / "out" / "large.restored.tif") as file:
        found = file.read().transpose(1, 2, 0)
        assert file.transform == rasterio.Affine(5, 0, 500, 0, -5, 900)
    assert np.abs(found.astype(int) - np.asarray(expected.restored)).max() <= 1
    assert record["restored"] == {"width": 150, "height": 122}
    assert json.loads((tmp_path / "out" / "large.json").read_text()) == record


@pytest.mark.long
@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_files(network, picture, whole, runtime, tmp_path):
    """A file of open size takes the picture, a file of a fixed size only in tiles or if the picture is smaller."""
    pytest.importorskip("openvino" if runtime == "openvino" else "onnxruntime", reason="needs the extra 'export'")
    from terrazzo.tools.export.checked import checked_export
    from terrazzo.tools.export.run import form_of
    from terrazzo.tools.export.targets import metadata, noise, restorer_for_export

    ready = restorer_for_export(network, TINY, (40, 40))
    form, facts = form_of(runtime, None, None), dict(output_names=("restored",), metadata=metadata(ready))
    opened, fixed = (tmp_path / f"{name}{form.suffixes[0]}" for name in ("open", "fixed"))
    assert checked_export(form, ready.module, noise((40, 40), 1), opened, dynamic=("hw",), **facts).passed
    assert checked_export(form, ready.module, noise((40, 40), 1), fixed, **facts).passed
    for path, tile in ((opened, None), (opened, 32), (fixed, 40)):
        prediction = terrazzo.Predictor(path, runtime=runtime, tile=tile, overlap=None if tile is None else 8)(picture)
        assert np.abs(np.asarray(prediction.restored).astype(int) - whole).max() <= 1
    with pytest.raises(InputError, match="takes pictures of 40x40 pixels, and this has 75x61"):
        terrazzo.Predictor(fixed, runtime=runtime)(picture)
    part = Image.open(picture).crop((0, 0, 33, 21))
    small = terrazzo.Predictor(fixed, runtime=runtime)(part).restored
    assert np.abs(np.asarray(small)[:36, :60].astype(int) - whole[:36, :60]).max() <= 1
    assert small.size == (66, 42)
    assert "after" in terrazzo.Predictor(opened, runtime=runtime, degrade=True)(picture).record
    with pytest.raises(InputError, match="a file does not say how far"):
        terrazzo.Predictor(opened, runtime=runtime, tile=32, overlap="auto")


@pytest.mark.long
def test_wide_pictures_are_drawn_smaller(network, tmp_path):
    """A JPEG ends at 65500 pixels, and two pictures of 40000 pixels would stand beside each other."""
    pixels = np.random.default_rng(0).integers(0, 255, (16, 20000, 3), dtype=np.uint8)
    prediction = terrazzo.Predictor(network, device="cpu")(pixels)
    write_prediction(tmp_path, "wide", prediction)
    assert Image.open(tmp_path / "wide.restored.png").size == (40000, 32)
    drawn = Image.open(tmp_path / "wide.overlay.jpg")
    drawn.load()
    assert 2 * 4096 < drawn.width < 2.2 * 4096


def test_any_drawing_fits_a_jpeg(tmp_path):
    write_prediction(tmp_path, "long", Prediction({}, lambda: Image.new("RGB", (3, 70000))))
    assert Image.open(tmp_path / "long.overlay.jpg").size == (3, 65500)


def test_a_failed_drawing_leaves_the_restored_picture(tmp_path):
    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):
        write_prediction(tmp_path, "large", Prediction({}, fail, restored=Image.new("RGB", (4, 4))))
    assert [path.name for path in tmp_path.iterdir()] == ["large.restored.png"]


def test_refusals(network, picture):
    with pytest.raises(InputError, match="merges and drops no tokens"):
        TokenWatch(RestorePredictor(network, torch.device("cpu")))
    oblong = RestorePredictor(network, torch.device("cpu"))
    oblong.size = (40, 60)
    with pytest.raises(InputError, match="takes images of 40x60, and tiles are square: export it with a square --size"):
        tile_engine(oblong, 40, None)
    with pytest.raises(InputError, match="leave --degrade out"):
        terrazzo.Predictor(timm.create_model(TINY, scale=1), device="cpu", degrade=True)
    with pytest.raises(InputError, match="leave --degrade out"):
        terrazzo.Predictor(timm.create_model("resnet10t"), device="cpu", degrade=True)
    with pytest.raises(InputError, match="less than the scale 2"):
        terrazzo.Predictor(timm.create_model(TINY), device="cpu", degrade=True)(np.zeros((1, 9, 3), np.uint8))
