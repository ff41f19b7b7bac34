"""Checks of pictures in every kind of data set: missing, empty, damaged or cut short."""

import shutil

import numpy as np
import pytest
from PIL import ImageFile
from support import tiny_data

from terrazzo.openmmlab.config import load_config, packaged_configs
from terrazzo.tools.data.checks import pictures
from terrazzo.tools.data.checks.pictures import read_ends, read_whole

DETECTOR = "retinanet_dinat-mini_fpn_1xb4-36e_bccd-640x480"
SEGMENTOR = "segformer-head_dinat-mini_1xb4-10k_camvid-480x360"
CLASSIFIER = "dinat-mini_1xb64-30e_eurosat64"
SIZE = (96, 64)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A tiny data set for each kind of config."""
    root = tmp_path_factory.mktemp("data")
    tiny_data.write_detection(root / DETECTOR, ("RBC", "WBC", "Platelets"), SIZE, masks=False)
    tiny_data.write_segmentation(root / SEGMENTOR, ".jpg", 11, SIZE)
    tiny_data.write_folders(root / CLASSIFIER, load_config(CLASSIFIER).metainfo.classes, SIZE, count=2)
    return root


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def scramble(path):
    content = bytearray(path.read_bytes())
    content[2:60] = bytes(58)
    path.write_bytes(content)


FAULTS = [
    (lambda path: path.write_bytes(b""), "is empty"),
    (lambda path: path.write_text("<html>"), "is not in a picture format"),
    (cut, "is damaged or cut short"),
    (scramble, "is"),
]


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("config", [DETECTOR, SEGMENTOR, CLASSIFIER])
@pytest.mark.parametrize(("spoil", "words"), FAULTS)
def test_a_bad_picture_is_refused(check, data, tmp_path, config, split, spoil, words):
    copy = shutil.copytree(data / config, tmp_path / "copy")
    picture = sorted(path for path in copy.rglob("*.jpg") if split in path.parts)[-1]
    spoil(picture)
    said = check(config, copy, split)
    assert said.startswith(f"refused: the {split} picture {picture} {words}")
    assert f"{split}_dataloader.dataset" in said


def test_several_bad_pictures_are_counted(check, data, tmp_path):
    copy = shutil.copytree(data / CLASSIFIER, tmp_path / "copy")
    for picture in (copy / "val" / "Forest").iterdir():
        picture.write_bytes(b"")
    assert "(and 1 more) is empty" in check(CLASSIFIER, copy, "val")


@pytest.mark.parametrize("format", ["jpeg", "png", "webp", "bmp", "tiff"])
def test_whole_pictures_have_no_fault(tmp_path, format):
    path = tmp_path / "picture"
    tiny_data.picture(np.random.default_rng(0), SIZE).save(path, format=format)
    for read in (read_whole, read_ends):
        assert read(path) == (*SIZE, 1, "")


@pytest.mark.parametrize("format", ["jpeg", "png"])
def test_the_end_of_a_large_picture_shows_that_it_was_cut(tmp_path, monkeypatch, format):
    """A picture is decoded only if its end leaves doubt, for example because a camera appended something."""
    path = tmp_path / "picture"
    tiny_data.picture(np.random.default_rng(0), (256, 256)).save(path, format=format)
    decoded, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(1) or load(self))
    assert read_ends(path).fault == ""
    assert not decoded
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(pictures._TAIL_BYTES))
    assert read_ends(path).fault == ""
    assert decoded
    path.write_bytes(whole[: len(whole) // 2])
    assert read_ends(path).fault.startswith("is damaged or cut short")


def test_large_data_sets_are_not_decoded(check, data, tmp_path, monkeypatch):
    """Damage in the middle of a file is found only in a small data set; damage at its end in any data set."""
    copy = shutil.copytree(data / CLASSIFIER, tmp_path / "copy")
    picture = copy / "train" / "River" / "River_0.jpg"
    tiny_data.picture(np.random.default_rng(0), SIZE).save(picture, format="png")
    content = picture.read_bytes()
    middle = len(content) // 2
    picture.write_bytes(content[:middle] + bytes(100) + content[middle + 100 :])
    assert "River_0.jpg is damaged" in check(CLASSIFIER, copy, "train")
    monkeypatch.setattr(pictures, "_DECODED_FILES", 3)
    assert check(CLASSIFIER, copy, "train") == ""
    cut(picture)
    assert "River_0.jpg is damaged" in check(CLASSIFIER, copy, "train")


def test_folders_of_classes(check, data, tmp_path):
    copy = shutil.copytree(data / CLASSIFIER, tmp_path / "copy")
    (copy / "train" / "River" / "README.txt").write_text("no picture")
    assert check(CLASSIFIER, copy, "train", "val", "test") == ""
    for picture in (copy / "val" / "River").iterdir():
        picture.unlink()
    said = check(CLASSIFIER, copy, "val")
    assert "Found no valid file for the classes River" in said
    assert "val_dataloader.dataset" in said
    (copy / "val" / "River").rmdir()
    assert "has classes AnnualCrop" in check(CLASSIFIER, copy, "val")
    shutil.rmtree(copy / "val")
    assert f"{copy / 'val'} does not exist; set --data-root or val_dataloader.dataset.split" in check(
        CLASSIFIER, copy, "val"
    )


def test_pictures_without_labels(check, tmp_path):
    root = tmp_path / "unlabelled"
    (root / "deep").mkdir(parents=True)
    for index in range(2):
        tiny_data.picture(np.random.default_rng(0), SIZE).save(root / "deep" / f"{index}.jpg")
    config = next(name for name, path in packaged_configs().items() if path.parent.name == "pretraining")
    assert check(config, root, "train") == ""
    cut(root / "deep" / "1.jpg")
    assert "1.jpg is damaged or cut short" in check(config, root, "train")
    shutil.rmtree(root / "deep")
    assert "holds no pictures" in check(config, root, "train")


def test_an_unknown_data_set_is_named(check, data):
    said = check(DETECTOR, data / DETECTOR, "train", **{"train_dataloader.dataset.type": "CocoDatset"})
    assert "train_dataloader.dataset.type is 'CocoDatset', which no registry has" in said


def test_other_data_sets_are_left_alone(check, data):
    """The checks do not know a VOC data set's format, so they only check that its files exist."""
    voc = dict(
        _delete_=True,
        type="XMLDataset",
        data_root="data/bccd",
        metainfo=dict(classes=("RBC", "WBC", "Platelets")),
        data_prefix=dict(sub_data_root=""),
        ann_file="annotations/instances_train.json",
        pipeline=[],
    )
    root = data / DETECTOR
    assert check(DETECTOR, root, "train", **{"train_dataloader.dataset": voc}) == ""
    said = check(DETECTOR, root, "train", **{"train_dataloader.dataset": {**voc, "ann_file": "train.txt"}})
    assert "train.txt does not exist; set --data-root or train_dataloader.dataset.ann_file" in said
