"""Pipelines and data sets read pictures like `terrazzo infer`, in any depth and orientation."""

import mmcv
import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from mmengine.registry import DATASETS, TRANSFORMS, init_default_scope
from PIL import Image
from torch.utils.data import DataLoader

from terrazzo._pictures import SUFFIXES, read_picture
from terrazzo.errors import InputError, own_text
from terrazzo.openmmlab.pictures import decode

GREY = (np.arange(32)[:, None] * 5 + np.arange(48)[None] * 2).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)
WIDE = GREY.astype(np.uint16) * 257
SCENES = {
    "colour.jpg": COLOUR,
    "grey.jpg": GREY,
    "grey.png": GREY,
    "colour.png": COLOUR,
    "wide.png": WIDE,
    "wide.tif": WIDE,
    "float.tif": (GREY / 255).astype(np.float32),
    "float255.tif": GREY.astype(np.float32),
    "colour.webp": COLOUR,
    "grey.gif": GREY,
}

pytestmark = pytest.mark.filterwarnings("ignore::terrazzo._pictures.PictureWarning")


def saved(pixels, path, turn=1, **options):
    exif = Image.Exif()
    exif[0x112] = turn
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return str(path)


def loaded(path, **options):
    """The picture that a pipeline's loader reads from a file, in RGB."""
    step = TRANSFORMS.build(dict(type="LoadImageFromFile", **options))
    results = step({"img_path": str(path)})
    assert results["img"].shape[:2] == results["img_shape"] == results["ori_shape"]
    return results["img"][..., ::-1]


@pytest.mark.parametrize("name", SCENES)
def test_pipelines_read_what_infer_reads(tmp_path, name):
    path = saved(SCENES[name], tmp_path / name)
    wanted = np.asarray(read_picture(path)).astype(int)
    assert np.abs(wanted - (GREY[..., None] if "colour" not in name else COLOUR)).mean() < 8
    for options in ({}, {"imdecode_backend": "pillow"}, {"imdecode_backend": None}, {"to_float32": True}):
        found = loaded(path, **options)
        assert found.dtype == (np.float32 if options.get("to_float32") else np.uint8)
        assert np.abs(found - wanted).max() <= (2 if name.endswith("jpg") else 0), options


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_pipelines_turn_pictures_upright(tmp_path, suffix, turn):
    path = saved(COLOUR, tmp_path / f"turned.{suffix}", turn)
    wanted = np.asarray(read_picture(path)).astype(int)
    grey = np.asarray(Image.fromarray(wanted.astype(np.uint8)).convert("L")).astype(int)
    for options in ({}, {"imdecode_backend": "pillow"}, {"color_type": "unchanged"}):
        found = loaded(path, **options)
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= 2, options
    step = LoadImageFromFile(color_type="grayscale")
    assert np.abs(step({"img_path": path})["img"] - grey).max() <= 2
    if suffix != "tif":  # Pillow and OpenCV always turn a TIFF
        assert np.abs(loaded(path, color_type="color_ignore_orientation") - COLOUR.astype(int)).mean() < 8


def test_transparency_is_dropped_by_every_backend(tmp_path):
    clear = Image.fromarray(GREY).convert("LA")
    clear.putalpha(Image.fromarray(GREY))
    clear.save(tmp_path / "clear.png")
    for backend in ("cv2", "pillow"):
        assert np.array_equal(loaded(tmp_path / "clear.png", imdecode_backend=backend)[..., 0], GREY)


def test_broken_exif_data_turn_nothing(tmp_path):
    """The picture stays, even if OpenCV still finds an orientation in the data."""
    path = tmp_path / "broken.jpg"
    saved(COLOUR, path, 6)
    content = bytearray(path.read_bytes())
    content[content.index(b"Exif") + 6] = 0  # the byte order, "MM"
    path.write_bytes(content)
    assert read_picture(path).size == (48, 32)
    for options in ({}, {"color_type": "unchanged"}, {"imdecode_backend": "pillow"}):
        assert loaded(path, **options).shape == (32, 48, 3), options


def test_animations_show_their_first_picture(tmp_path):
    """In an animated PNG, the first picture may also be a separate still picture."""
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (50, 100, 200)]
    for name, options in {"a.png": {}, "still.png": {"default_image": True}, "a.gif": {}, "a.webp": {}}.items():
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert np.abs(loaded(tmp_path / name).astype(int) - 50).max() <= 2, name


def test_unchanged_values_stay_as_they_are(tmp_path):
    path = saved(WIDE, tmp_path / "wide.png")
    step = TRANSFORMS.build(dict(type="LoadImageFromFile", color_type="unchanged"))
    assert np.array_equal(step({"img_path": path})["img"], WIDE)
    content = (tmp_path / "wide.png").read_bytes()
    assert np.array_equal(mmcv.imfrombytes(content, flag="color", channel_order="rgb")[..., 0], GREY)
    assert np.array_equal(mmcv.imread(path, channel_order="rgb")[..., 0], GREY)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("flag", ["color", "grayscale", "unchanged"])
@pytest.mark.parametrize("backend", ["cv2", "pillow"])
@pytest.mark.parametrize("limit", [100, 1000])  # Pillow itself refuses beyond twice its limit
def test_pictures_of_too_many_pixels_are_refused(tmp_path, monkeypatch, flag, backend, limit):
    """Pictures and label maps alike, before a decoder takes memory."""
    saved(GREY, tmp_path / "large.png")
    content = (tmp_path / "large.png").read_bytes()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr("terrazzo.openmmlab.pictures._mmcv_decode", lambda *rest: pytest.fail("decoded"))
    with pytest.raises(InputError, match=r"large\.png has .* pixels, more than the limit"):
        decode(content, flag, backend=backend, name="large.png")


def test_plain_pictures_are_decoded_by_opencv(tmp_path, monkeypatch):
    """OpenCV is faster than Pillow, so training is as fast as without terrazzo."""
    monkeypatch.setattr("terrazzo.openmmlab.pictures.read_picture", lambda *rest: pytest.fail("not by OpenCV"))
    for name in ("colour.jpg", "grey.jpg", "colour.png", "grey.png"):
        loaded(saved(SCENES[name], tmp_path / name))


def cut(path, content, share):
    path.write_bytes(content[: int(len(content) * share)])
    return str(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp", "gif"])
@pytest.mark.parametrize("share", [0, 0.1, 0.6])
def test_damaged_pictures_are_refused_by_name(tmp_path, suffix, share):
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(tmp_path / f"whole.{suffix}")
    path = cut(tmp_path / f"short.{suffix}", (tmp_path / f"whole.{suffix}").read_bytes(), share)
    for options in ({}, {"color_type": "unchanged"}, {"imdecode_backend": "pillow"}):
        with pytest.raises(InputError, match=rf"picture .*short\.{suffix} (is|cannot be) "):
            loaded(path, **options)
    step = TRANSFORMS.build(dict(type="LoadImageFromFile", ignore_empty=True))
    assert step({"img_path": path}) is None


def test_a_jpeg_cut_short_is_refused_where_opencv_says_nothing(tmp_path, monkeypatch):
    """OpenCV before version 5 fills the rest with grey."""
    Image.fromarray(COLOUR).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    monkeypatch.setattr("terrazzo.openmmlab.pictures._mmcv_decode", lambda *rest: COLOUR)
    assert decode(content) is COLOUR
    assert decode(content + b"more") is COLOUR
    for short in (content[:-2], content[: len(content) // 2]):
        with pytest.raises(InputError, match="damaged or cut short"):
            decode(short)


def test_decoders_that_are_not_there_are_said(tmp_path):
    path = saved(COLOUR, tmp_path / "whole.png")
    for options in ({"imdecode_backend": "any"}, {"color_type": "colourful"}):
        with pytest.raises(InputError, match=r"whole\.png cannot be decoded by (any|cv2: 'colourful')"):
            loaded(path, **options)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"picture .*none\.jpg cannot be read: No such file"):
        loaded(tmp_path / "none.jpg")


@pytest.mark.parametrize("turn", range(1, 9))
def test_label_maps_are_turned_as_their_pictures(tmp_path, turn):
    """mmseg's and mmdet's loaders do so with Pillow and OpenCV; different orientations are refused."""
    init_default_scope("mmseg")
    labels = GREY // 32
    sample = {
        "img_path": saved(COLOUR, tmp_path / "a.png", turn),
        "seg_map_path": saved(labels, tmp_path / "labels.png", turn),
        "reduce_zero_label": False,
        "seg_fields": [],
    }
    image = TRANSFORMS.build(dict(type="LoadImageFromFile"))
    wanted = np.asarray(read_picture(sample["seg_map_path"]))[..., 0]
    for scope in ("mmseg", "mmdet"):
        for backend in ("pillow", "cv2"):
            options = dict(with_bbox=False, with_label=False, with_seg=True) if scope == "mmdet" else {}
            step = dict(type=f"{scope}.LoadAnnotations", imdecode_backend=backend, **options)
            with TRANSFORMS.switch_scope_and_registry(scope) as registry:
                annotations = registry.build(step)
            results = annotations(image({**sample, "seg_fields": []}))
            assert np.array_equal(results["gt_seg_map"], wanted)
    unlike = saved(labels, tmp_path / "unlike.png", other := turn % 8 + 1)
    with pytest.raises(InputError, match=rf"a\.png has EXIF orientation {turn}, but .*unlike\.png has {other}"):
        image({**sample, "seg_map_path": unlike})


@pytest.mark.parametrize(
    ("scope", "options"),
    [
        ("mmseg", dict(type="LoadAnnotations")),
        ("mmdet", dict(type="LoadAnnotations", with_bbox=False, with_label=False, with_seg=True)),
        ("mmdet", dict(type="LoadPanopticAnnotations", with_bbox=False, with_label=False, with_mask=False)),
    ],
    ids=["mmseg", "mmdet", "panoptic"],
)
def test_label_maps_that_cannot_be_read_are_named(tmp_path, scope, options):
    init_default_scope(scope)
    step = TRANSFORMS.build({**options, "type": f"{scope}.{options['type']}"})
    saved(np.random.default_rng(0).integers(0, 9, (32, 48), dtype=np.uint8), tmp_path / "whole.png")
    short = cut(tmp_path / "short.png", (tmp_path / "whole.png").read_bytes(), 0.6)
    sample = {"reduce_zero_label": False, "seg_fields": [], "ori_shape": (32, 48), "height": 32, "width": 48}
    for path, reason in ((str(tmp_path / "none.png"), "No such file"), (short, ".* damaged")):
        with pytest.raises(InputError, match=f"label map {path} cannot be read: {reason}"):
            step({**sample, "seg_map_path": path})


def test_boxes_of_a_turned_picture_are_for_the_upright_one(tmp_path):
    path = saved(COLOUR, tmp_path / "turned.jpg", 6)
    step = TRANSFORMS.build(dict(type="LoadImageFromFile"))
    assert step({"img_path": path, "width": 32, "height": 48})["img"].shape == (48, 32, 3)
    with pytest.raises(InputError, match=r"turned\.jpg is 32x48 .* orientation 6 .* annotations are for 48x32"):
        step({"img_path": path, "width": 48, "height": 32})


PLAIN = dict(input_size=32, is_training=False, crop_pct=1.0)


@pytest.fixture
def folder(tmp_path):
    """A data set of one class with the scene in every form, including upside down with an EXIF orientation."""
    for name, pixels in SCENES.items():
        saved(pixels, tmp_path / "train" / "only" / name)
    saved(COLOUR[::-1, ::-1], tmp_path / "train" / "only" / "colour_turned.png", 3)
    (tmp_path / "train" / "only" / "notes.txt").write_text("no picture")
    return tmp_path


@pytest.mark.parametrize("kind", ["ImageFolderDataset", "RotatedImages"])
def test_data_sets_of_folders_read_what_infer_reads(folder, kind):
    """Grey pictures are equal in every depth, and colours in every format and orientation."""
    rotation = {"rotation": dict(patch_size=4, windows=(8,))} if kind == "RotatedImages" else {}
    dataset = DATASETS.build(dict(type=kind, data_root=str(folder), split="train", transform=PLAIN, **rotation))
    assert len(dataset) == len(SCENES) + 1
    files = dataset.files if kind == "RotatedImages" else [path for path, _ in dataset.images.samples]
    key = "targets" if kind == "RotatedImages" else "inputs"
    shown = {str(path).rpartition("/")[2]: dataset[index][key] for index, path in enumerate(files)}
    for colour in ("colour", "grey"):
        wanted = shown[f"{colour}.png"]
        for name, pixels in shown.items():
            if name.startswith(colour) or (colour == "grey" and not name.startswith("colour")):
                assert (pixels - wanted).abs().mean() < 0.1, name


def test_one_list_of_suffixes(tmp_path):
    names = [f"{index}{suffix}" for index, suffix in enumerate((*SUFFIXES, ".PNG"))]
    for name in names:
        saved(GREY, tmp_path / "train" / "a" / name, format="png")
    dataset = DATASETS.build(dict(type="ImageFolderDataset", data_root=str(tmp_path), split="train", transform=PLAIN))
    assert len(dataset) == len(names)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_of_a_folder_is_named_from_worker_processes_too(folder, workers):
    images = folder / "train" / "only"
    cut(images / "short.jpg", (images / "colour.jpg").read_bytes(), 0.6)
    dataset = DATASETS.build(dict(type="ImageFolderDataset", data_root=str(folder), split="train", transform=PLAIN))
    with pytest.raises(InputError) as caught:
        list(DataLoader(dataset, batch_size=4, num_workers=workers))
    assert own_text(caught.value).startswith(f"picture {images}/short.jpg is damaged or cut short")
    assert "\n" not in own_text(caught.value)
