"""Checks of label maps: all maps are read and compared with their pictures and with the config's classes."""

import shutil

import numpy as np
import pytest
from PIL import Image
from support import tiny_data

CAMVID = "segformer-head_dinat-mini_1xb4-10k_camvid-480x360"
SIZE = (96, 64)


@pytest.fixture(scope="session")
def streets(tmp_path_factory):
    """A data set in CamVid's layout with six pictures per split: 11 classes, and 255 for unlabelled pixels."""
    root = tmp_path_factory.mktemp("data") / "streets"
    tiny_data.write_segmentation(root, ".jpg", 11, SIZE)
    for split in tiny_data.SPLITS:
        for kind, suffix in (("images", "jpg"), ("labels", "png")):
            for index in range(2, 6):
                shutil.copy(root / kind / split / f"0.{suffix}", root / kind / split / f"{index}.{suffix}")
    return root


@pytest.fixture
def copy(streets, tmp_path):
    return shutil.copytree(streets, tmp_path / "copy")


def labels(size=SIZE, value=1, second=2, dtype=np.uint8):
    values = np.full((size[1], size[0]), value, dtype)
    values[:8, :8] = second
    return values


def as_palette():
    image = Image.fromarray(labels(), mode="L").convert("P")
    image.putpalette([200, 10, 7] * 256)
    return image


def colours():
    return Image.fromarray(np.stack([labels()] * 3, -1))


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Image.fromarray(labels(second=11)), "has class 11, but the config has 11 classes, 0 to 10"),
        (lambda: Image.fromarray(labels((48, 64))), "has 48x64 pixels, but its picture has 96x64"),
        (lambda: Image.fromarray(labels((64, 96))), "has 64x96 pixels"),
        (colours, "not a map of class numbers: it has Pillow's mode RGB, 3 channels"),
        (lambda: colours().convert("RGBA"), "mode RGBA, 4 channels"),
        (lambda: Image.fromarray(labels()).convert("LA"), "mode LA, 2 channels"),
        (lambda: Image.fromarray(labels(second=256, dtype=np.uint16)), "has class 256"),  # 256 is 0 in 8 bits
        (lambda: Image.fromarray(labels(second=-1, dtype=np.int32)), "has class -1"),
        (lambda: Image.fromarray(labels(second=1.5, dtype=np.float32)), "fractions"),
    ],
)
def test_a_wrong_map_is_refused_beyond_the_fourth(check, copy, split, make, words):
    path = copy / "labels" / split / "5.png"
    image = make()
    image.save(path, format="TIFF" if image.mode in ("I", "F") else "PNG")
    said = check(CAMVID, copy, split)
    assert said.startswith("refused")
    assert words in said
    assert f"{split} label map {path}" in said


@pytest.mark.parametrize(
    "make",
    [
        as_palette,
        lambda: Image.fromarray(labels(dtype=np.uint16)),
        lambda: Image.fromarray(labels(second=255)),
        lambda: Image.fromarray(labels(second=1, value=0).astype(bool)),
    ],
)
def test_maps_of_other_modes_that_mmseg_reads_rightly(check, copy, make):
    make().save(copy / "labels" / "train" / "5.png")
    assert check(CAMVID, copy, "train") == ""


def test_opencv_reads_palettes_as_colours(check, copy):
    as_palette().save(copy / "labels" / "train" / "5.png")
    step = {"train_dataloader.dataset.pipeline.1.imdecode_backend": "cv2"}
    assert "5.png is not a map of class numbers: cv2 reads it as 3 channels" in check(CAMVID, copy, "train", **step)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(b""), "5.png is empty"),
        (lambda path: path.write_bytes(b"no picture"), "5.png is not in a picture format"),
        (lambda path: path.write_bytes(path.read_bytes()[:-60]), "5.png is damaged or cut short"),
        (lambda path: path.unlink(), "5.png does not exist, and its picture does"),
        (lambda path: path.rename(path.with_suffix(".PNG")), "the folder has 5.PNG"),
        (lambda path: path.rename(path.with_suffix(".tif")), "the folder has 5.tif"),
    ],
)
def test_damaged_and_missing_maps(check, copy, spoil, words):
    spoil(copy / "labels" / "val" / "5.png")
    said = check(CAMVID, copy, "val")
    assert words in said
    assert check(CAMVID, copy, "train", "test") == ""


def test_a_map_without_a_picture(check, copy):
    """The map is not read, so a warning names it; if its picture exists under an unread name, the set is refused."""
    picture = copy / "images" / "train" / "5.jpg"
    renamed = picture.rename(picture.with_suffix(".JPG"))
    said = check(CAMVID, copy, "train")
    assert said.startswith("refused")
    assert f"has a picture that is not read, {renamed}" in said
    renamed.unlink()
    said = check(CAMVID, copy, "train")
    assert said.startswith("warning")
    assert f"{copy / 'labels' / 'train' / '5.png'} has no picture" in said


def test_maps_of_pictures_that_indices_leave_out(check, copy):
    """As in the configs of a zoom, which hold out a part of train; a map without a picture is still told."""
    part = {"train_dataloader.dataset.indices": 2, "val_dataloader.dataset.indices": -1}
    assert check(CAMVID, copy, "train", "val", **part) == ""
    (copy / "images" / "train" / "5.jpg").unlink()
    assert "labels/train/5.png has no picture and is not read" in check(CAMVID, copy, "train", **part)


def test_pictures_of_another_suffix(check, copy):
    for path in (copy / "images" / "train").iterdir():
        path.rename(path.with_suffix(".JPG"))
    said = check(CAMVID, copy, "train")
    assert "ends in '.jpg', the data set's img_suffix; there are files that end in .JPG" in said
    assert "set train_dataloader.dataset.img_suffix" in said
    assert check(CAMVID, copy, "train", **{"train_dataloader.dataset.img_suffix": ".JPG"}) == ""


def test_a_list_of_names(check, copy, tmp_path):
    """Only the listed pictures are read."""
    (copy / "train.txt").write_text("0\n5\n")
    (copy / "labels" / "train" / "1.png").write_bytes(b"")
    listed = {"train_dataloader.dataset.ann_file": "train.txt"}
    assert check(CAMVID, copy, "train", **listed) == ""
    (copy / "train.txt").write_text("0\ngone\n")
    assert "gone.jpg does not exist" in check(CAMVID, copy, "train", **listed)
    (copy / "train.txt").write_text("")
    assert "train.txt names no picture" in check(CAMVID, copy, "train", **listed)


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        ((0, 255), {}, "hold nothing but class 0 (sky and 255, which is ignored)"),
        ((3, 3), {}, "hold nothing but class 3 (road)"),
        ((0, 1), {"reduce_zero_label": True}, "hold nothing but class 0 (sky and 0, which is ignored)"),
        ((255, 255), {}, "hold nothing but pixels that are ignored"),
        ((0, 1), {}, None),
        ((1, 11), {"reduce_zero_label": True}, None),
        ((1, 12), {"reduce_zero_label": True}, "has class 11 (value 12, less 1 by reduce_zero_label)"),
    ],
)
def test_what_all_maps_hold(check, copy, values, options, words):
    for path in (copy / "labels" / "train").iterdir():
        Image.fromarray(labels(value=values[0], second=values[1])).save(path)
    said = check(CAMVID, copy, "train", **{f"train_dataloader.dataset.{key}": value for key, value in options.items()})
    assert said == "" if words is None else words in said


def test_what_a_head_ignores(check, copy):
    Image.fromarray(labels(second=11)).save(copy / "labels" / "train" / "5.png")
    said = check(CAMVID, copy, "train", **{"model.decode_head.ignore_index": 11})
    assert "has class 255" in said  # in the other maps: the head's loss ignores a single number
    for path in (copy / "labels" / "train").iterdir():
        values = labels(second=11)
        values[-1] = 2
        Image.fromarray(values).save(path)
    assert check(CAMVID, copy, "train", **{"model.decode_head.ignore_index": 11}) == ""
    assert "set model.decode_head.ignore_index" in check(CAMVID, copy, "train")


def test_classes_of_a_data_set_are_renumbered_as_mmseg_does(check, tmp_path):
    """mmseg's class for ADE20K leaves out 0 and, with two classes, ignores the others; it sets suffixes."""
    root = tmp_path / "ade"
    tiny_data.write_ade20k(root)
    config = "fpn_s2aformer-mini_8xb4-40k_ade20k-512x512"
    assert check(config, root, "train", "val") == ""
    few = {"train_dataloader.dataset.metainfo.classes": ["building", "tree"], "model.decode_head.num_classes": 2}
    assert check(config, root, "train", **few) == ""
    path = next((root / "annotations" / "training").iterdir())
    Image.fromarray(labels(second=151)).save(path)
    assert "has class 150 (value 151, less 1 by reduce_zero_label)" in check(config, root, "train")


def turn(path, orientation, size=None):
    image = Image.open(path)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (image.resize(size, Image.Resampling.NEAREST) if size else image).save(path, exif=exif)


@pytest.mark.parametrize("size", [(96, 64), (64, 64)])
@pytest.mark.parametrize("orientation", [3, 6])
def test_a_map_is_turned_as_its_picture_is(check, copy, orientation, size):
    picture, path = copy / "images" / "test" / "5.jpg", copy / "labels" / "test" / "5.png"
    turn(path, 1, size)
    turn(picture, orientation, size)
    said = check(CAMVID, copy, "test")
    assert f"label map {path} is not turned, but its picture is, by EXIF orientation {orientation}" in said
    turn(path, orientation)
    assert check(CAMVID, copy, "test") == ""
    turn(picture, 1)
    assert f"is turned by EXIF orientation {orientation}, but its picture is not" in check(CAMVID, copy, "test")


def test_a_test_set_without_maps(check, copy):
    """A pipeline that reads no maps needs no maps."""
    shutil.rmtree(copy / "labels" / "test")
    assert "labels/test does not exist" in check(CAMVID, copy, "test")
    unlabelled = {
        "test_dataloader.dataset.data_prefix": dict(_delete_=True, img_path="images/test"),
        "test_dataloader.dataset.pipeline": [dict(type="LoadImageFromFile"), dict(type="PackSegInputs")],
    }
    assert check(CAMVID, copy, "test", **unlabelled) == ""


def test_masks_of_255_are_warned_of_by_the_command(run, copy, tmp_path):
    """Masks of 255 train only the background. This is not an error, so one line per split warns."""
    for split in ("train", "val"):
        for path in (copy / "labels" / split).iterdir():
            Image.fromarray(labels(value=0, second=255)).save(path)
    broken = ("--cfg-options", "model.backbone.name=dinat_minny")
    result = run("train", CAMVID, "--data-root", copy, "--work-dir", tmp_path / "work", *broken)
    assert "the train label maps" in result.stderr
    assert "the val label maps" in result.stderr
    assert "hold nothing but class 0 (sky and 255, which is ignored)" in result.stderr
