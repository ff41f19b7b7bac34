"""Checks of COCO annotations: errors in values that mmdet or pycocotools read are refused by name."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from support import tiny_data

BOXES = "retinanet_dinat-mini_fpn_1xb4-36e_bccd-640x480"
MASKS = "mask-rcnn_dinat-mini_fpn_1xb2-36e_nuclei-768x768"
SIZE = (96, 64)
NO_CLASSES = {f"{split}_dataloader.dataset.metainfo": None for split in ("train", "val", "test")}


@pytest.fixture(scope="session")
def cells(tmp_path_factory):
    """A data set in BCCD's layout: boxes of three classes."""
    root = tmp_path_factory.mktemp("data") / "cells"
    tiny_data.write_detection(root, ("RBC", "WBC", "Platelets"), SIZE, masks=False)
    return root


@pytest.fixture(scope="session")
def nuclei(tmp_path_factory):
    """A data set in the nuclei's layout: masks of one class."""
    root = tmp_path_factory.mktemp("data") / "nuclei"
    tiny_data.write_detection(root, ("nucleus",), SIZE, masks=True)
    return root


def broken(root, tmp_path, split, change):
    """A copy of a data set; a function has changed the content of one of its annotation files."""
    copy = shutil.copytree(root, tmp_path / "copy")
    path = copy / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))
    return copy


def first(kind, **changes):
    """A change of the second entry of a kind; None removes the key."""

    def change(content):
        for key, value in changes.items():
            if value is None:
                del content[kind][1][key]
            else:
                content[kind][1][key] = value

    return change


def every(kind, **changes):
    def change(content):
        for item in content[kind]:
            item.update(changes)

    return change


def twice(kind):
    def change(content):
        content[kind][1]["id"] = content[kind][0]["id"]

    return change


def without(key):
    return lambda content: content.pop(key) and None


def as_text(kind, key):
    def change(content):
        for item in content[kind]:
            item[key] = str(item[key])

    return change


IN_ALL_SPLITS = [
    (first("annotations", area=None), "annotations[1] (id 2) has no area"),
    (first("annotations", area="12"), 'annotations[1] (id 2) has area "12"'),
    (first("annotations", bbox=None), "annotations[1] (id 2) has no bbox"),
    (first("annotations", bbox=[]), "annotations[1] (id 2) has the bbox []"),
    (first("annotations", bbox=[1, 2, 3]), "has the bbox [1, 2, 3]"),
    (first("annotations", bbox=[1, 2, 3, 4, 5]), "has the bbox [1, 2, 3, 4, 5]"),
    (first("annotations", bbox=["1", "2", "3", "4"]), 'has the bbox ["1", "2", "3", "4"]'),
    (first("annotations", bbox="1 2 3 4"), 'has the bbox "1 2 3 4"'),
    (first("annotations", bbox=[1, 2, float("nan"), 4]), "has the bbox [1, 2, NaN, 4]"),
    (first("annotations", bbox={"x": 1}), "has the bbox"),
    (first("annotations", id=None), "annotations[1] has no id"),
    (first("annotations", image_id=None), "annotations[1] (id 2) has no image_id"),
    (first("annotations", category_id=None), "annotations[1] (id 2) has no category_id"),
    (first("annotations", image_id=77), "has image_id 77, which no image has"),
    (first("annotations", category_id=77), "has category_id 77, which no category has"),
    (first("annotations", image_id=[1]), "has image_id [1]"),
    (as_text("annotations", "image_id"), "the image has 0: write both as numbers"),
    (as_text("images", "id"), "the image has '0': write both as numbers"),
    (as_text("annotations", "category_id"), "write both as numbers"),
    (twice("annotations"), "annotations[1] (id 1) has the id of another annotation"),
    (twice("images"), "images[1] (id 0) has the id of another image"),
    (twice("categories"), "categories[1] (id 1) has the id of another category"),
    (first("images", id=None), "images[1] has no id"),
    (first("images", file_name=None), "images[1] (id 1) has no file_name"),
    (first("images", width=None), "images[1] (id 1) has no width"),
    (first("images", height="64"), 'images[1] (id 1) has height "64"'),
    (first("images", height=0), "images[1] (id 1) has height 0"),
    (first("images", width=64, height=96), "has 96x64 pixels, but"),
    (first("images", file_name="images\\1.jpg"), "its name has backslashes"),
    (first("images", file_name="1.JPG"), "the folder has 1.jpg"),
    (first("images", file_name="1.png"), "the folder has 1.jpg"),
    (first("images", file_name="gone/1.jpg"), "gone does not exist"),
    (first("categories", name=None), "categories[1] (id 2) has no name"),
    (first("categories", name="RBC"), "this file does not have WBC"),
    (every("categories", name="cell"), "this file does not have RBC, WBC, Platelets"),
    (without("images"), "it has no list of images"),
    (without("categories"), "it has no list of categories"),
    (without("annotations"), "it has no list of annotations"),
    (lambda content: content.update(images=[]), "the data set is empty"),
    (lambda content: content.update(annotations=[]), "it has no box of the config's classes"),
    (lambda content: content.update(annotations=["x"]), "annotations[0] is a text"),
    (lambda content: content.update(images={"0": content["images"][0]}), "it has no list of images"),
    (every("annotations", bbox=[8, 10, 0, 4]), "it has no box of the config's classes that can be used, among 6"),
    (every("annotations", bbox=[8, 10, 4, -4]), "it has no box"),
    (every("annotations", bbox=[500, 10, 4, 4]), "it has no box"),
    (lambda content: [content], "its top level is a list"),
    (lambda content: 7, "its top level is a number"),
]


@pytest.mark.parametrize(("change", "words"), IN_ALL_SPLITS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_broken_annotations_are_refused(check, cells, tmp_path, split, change, words):
    said = check(BOXES, broken(cells, tmp_path, split, change), split)
    assert said.startswith("refused")
    assert words in said
    assert f"instances_{split}.json" in said


@pytest.mark.parametrize(("change", "words"), IN_ALL_SPLITS[:2] + IN_ALL_SPLITS[-1:])
def test_only_the_splits_in_use_are_looked_at(check, cells, tmp_path, change, words):
    copy = broken(cells, tmp_path, "val", change)
    assert check(BOXES, copy, "train", "test") == ""
    assert words in check(BOXES, copy, "train", "val")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (first("annotations", segmentation=None), "there is none, but masks are read"),
        (first("annotations", segmentation=[]), "there is none, but masks are read"),
        (first("annotations", segmentation=[[1, 1, 9, 9]]), "a polygon has 4 numbers"),
        (first("annotations", segmentation=[[1, 1, 9, 9, 9, 1, 4]]), "a polygon has 7 numbers"),
        (first("annotations", segmentation=[1, 1, 9, 9, 9, 1]), "each polygon a list"),
        (first("annotations", segmentation=[["1", "1", "9", "9", "9", "1"]]), "not a finite number"),
        (first("annotations", segmentation="mask.png"), "must be a list of polygons"),
        (first("annotations", segmentation={"size": [96, 64], "counts": [6144]}), "its size is [96, 64]"),
        (first("annotations", segmentation={"size": [64, 96], "counts": [9, 9]}), "add up to 18 pixels"),
        (first("annotations", segmentation={"size": [64, 96], "counts": "~~~"}), "not run lengths"),
        (first("annotations", segmentation={"size": [64, 96]}), "not run lengths"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_broken_masks_are_refused(check, nuclei, tmp_path, split, change, words):
    said = check(MASKS, broken(nuclei, tmp_path, split, change), split)
    assert said.startswith("refused")
    assert "annotations[1] (id 2) has a segmentation that cannot be read: " in said
    assert words in said


def test_masks_that_hold(check, nuclei, tmp_path):
    """Polygons, plain and packed run lengths, and short polygons among valid polygons all pass; real data has them."""
    triangle = [1, 1, 9, 9, 9, 1]

    def change(content):
        content["annotations"][0]["segmentation"] = [triangle, [1, 1, 2, 2]]
        content["annotations"][1]["segmentation"] = {"size": [64, 96], "counts": [100, 44, 6000]}

    copy = broken(nuclei, tmp_path, "val", change)
    assert check(MASKS, copy, "train", "val", "test") == ""


@pytest.mark.parametrize(
    ("change", "split"),
    [
        (first("annotations", iscrowd=None), "train"),  # only the evaluation reads iscrowd
        (first("annotations", segmentation=None), "train"),  # no masks are read
        (first("annotations", segmentation=[[1, 2]]), "val"),
        (first("annotations", bbox=[8, 10, 0, 4]), "train"),  # mmdet drops this box, and others remain
        (first("annotations", bbox=[500, 10, 4, 4]), "val"),
        (first("categories", supercategory=7), "test"),
    ],
)
def test_what_nothing_reads_is_not_demanded(check, cells, tmp_path, change, split):
    assert check(BOXES, broken(cells, tmp_path, split, change), split) == ""


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_evaluation_reads_iscrowd(check, cells, tmp_path, split):
    said = check(BOXES, broken(cells, tmp_path, split, first("annotations", iscrowd=None)), split)
    assert "annotations[1] (id 2) has no iscrowd" in said


def test_a_test_set_without_annotations_is_for_writing_results_down(check, cells, tmp_path):
    copy = broken(cells, tmp_path, "test", without("annotations"))
    assert "set the metric's format_only" in check(BOXES, copy, "test")
    options = {"test_evaluator.format_only": True, "test_evaluator.outfile_prefix": str(tmp_path / "boxes")}
    assert check(BOXES, copy, "test", **options) == ""


def test_a_filter_that_leaves_no_picture_is_named(check, cells):
    said = check(BOXES, cells, "train", **{"train_dataloader.dataset.filter_cfg.min_size": 65})
    assert "filter_cfg drops every picture" in said
    assert "min_size is 65" in said


def test_classes_in_another_order_are_told_of(check, cells, tmp_path):
    copy = broken(cells, tmp_path, "train", lambda content: content["categories"].reverse())
    said = check(BOXES, copy, "train")
    assert said.startswith("warning: ")
    assert "in the order Platelets, WBC, RBC" in said
    assert said.count("\n") == 1


def test_classes_of_the_data_set_s_own_class(cells, check):
    """Without metainfo, COCO's 80 classes apply, and are compared with the head and with the file."""
    said = check(BOXES, cells, "train", **NO_CLASSES)
    assert "num_classes is 3, but CocoDataset has, unless train_dataloader.dataset.metainfo.classes names" in said
    said = check(BOXES, cells, "train", **NO_CLASSES, **{"model.bbox_head.num_classes": 80})
    assert "the config has 80 classes, but this file does not have person" in said
    assert "its 3 are: RBC, WBC, Platelets" in said


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b'{"images": [', "not readable JSON, and may be cut short"),
        ('{"images": "\u00e9"}'.encode("latin-1"), "it is not in UTF-8"),
        ("{}".encode("utf-16"), "it is not in UTF-8"),
        (b"[" * 100000, "not readable JSON"),
        (b"null", "its top level is a null"),
    ],
)
def test_files_that_are_no_annotations_are_refused(check, cells, tmp_path, split, content, words):
    copy = shutil.copytree(cells, tmp_path / "copy")
    (copy / "annotations" / f"instances_{split}.json").write_bytes(content)
    said = check(BOXES, copy, split)
    assert words in said
    assert f"(named by {split}_dataloader.dataset.ann_file)" in said


def test_a_byte_order_mark_is_read_over(check, cells, tmp_path):
    """The check, mmdet's data sets and mmdet's metrics skip a byte order mark."""
    from mmdet.datasets.api_wrappers import COCO, COCOPanoptic

    copy = shutil.copytree(cells, tmp_path / "copy")
    path = copy / "annotations" / "instances_val.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert check(BOXES, copy, "val") == ""
    assert len(COCO(str(path)).imgs) == 2
    path.write_bytes(b'\xef\xbb\xbf{"images": [], "annotations": [], "categories": []}')
    assert COCOPanoptic(str(path)).imgs == {}


def test_the_metric_s_file_is_checked_as_well(check, cells, tmp_path):
    """A metric's separate annotations may lack a picture of the data set, or be broken."""
    other = tmp_path / "other.json"
    option = {"val_evaluator.ann_file": str(other)}
    content = json.loads((cells / "annotations" / "instances_val.json").read_text())
    other.write_text(json.dumps(content))
    assert check(BOXES, cells, "val", **option) == ""
    short = {
        **content,
        "images": content["images"][:1],
        "annotations": [item for item in content["annotations"] if item["image_id"] == 0],
    }
    other.write_text(json.dumps(short))
    assert "has no picture with the id 1" in check(BOXES, cells, "val", **option)
    first("annotations", area=None)(content)
    other.write_text(json.dumps(content))
    said = check(BOXES, cells, "val", **option)
    assert "annotations[1] (id 2) has no area" in said
    assert "(named by val_evaluator.ann_file)" in said
    other.unlink()
    assert "other.json does not exist" in check(BOXES, cells, "val", **option)


def test_wrapped_data_sets_are_checked(check, cells, tmp_path):
    """Data sets inside RepeatDataset and ConcatDataset are checked; the error names the nested key."""
    from terrazzo.openmmlab.config import load_config

    copy = broken(cells, tmp_path, "train", first("annotations", bbox=None))
    good = load_config(BOXES, cells).train_dataloader.dataset
    bad = load_config(BOXES, copy).train_dataloader.dataset
    wrapped = dict(type="RepeatDataset", times=2, dataset=dict(type="ConcatDataset", datasets=[good, bad]))
    said = check(BOXES, cells, "train", **{"train_dataloader.dataset": dict(_delete_=True, **wrapped)})
    assert "has no bbox (" not in said
    assert "(named by train_dataloader.dataset.dataset.datasets.1.ann_file)" in said


def turned(path, orientation, size=None):
    image = Image.open(path).convert("RGB")
    image = image.resize(size) if size else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("orientation", "size", "said_size", "words"),
    [
        (6, (96, 64), (96, 64), "is read upright as 64x96, but"),
        (8, (96, 64), (96, 64), "is read upright as 64x96, but"),
        (6, (96, 64), (64, 96), None),  # annotated in the orientation in which it is read
        (6, (64, 64), (64, 64), "its size does not show"),
        (3, (96, 64), (96, 64), "its size does not show"),
        (2, (96, 64), (96, 64), "its size does not show"),
        (1, (96, 64), (96, 64), None),
        (0, (96, 64), (96, 64), None),  # without an orientation
    ],
)
def test_turned_pictures_with_boxes(check, cells, tmp_path, split, orientation, size, said_size, words):
    change = first("images", width=said_size[0], height=said_size[1])
    copy = broken(cells, tmp_path, split, change)
    turned(copy / "images" / split / "1.jpg", orientation, size)
    said = check(BOXES, copy, split)
    if words is None:
        assert said == ""
    else:
        assert words in said
        assert f"EXIF orientation {orientation}" in said
        assert "1.jpg" in said
    if said_size == size:
        as_stored = {f"{split}_dataloader.dataset.pipeline.0.color_type": "color_ignore_orientation"}
        assert check(BOXES, copy, split, **as_stored) == ""


def test_panoptic_data(check, tmp_path):
    """COCO's panoptic segmentations: the json's segments, and the pictures of the segments."""
    config = "mask2former_dinat-large_16xb1-lsj-100e_coco-panoptic"
    root = tmp_path / "coco"
    tiny_data.write_coco(root)
    assert check(config, root, "train", "val") == ""
    path = root / "annotations" / "panoptic_val2017.json"
    good = path.read_text()
    for change, words in [
        (lambda segment: segment.pop("area"), "segments_info[1], has no area"),
        (lambda segment: segment.update(bbox=[1]), "segments_info[1], has the bbox [1]"),
        (lambda segment: segment.update(category_id=9999), "segments_info[1], has category_id 9999"),
        (lambda segment: segment.pop("iscrowd"), "segments_info[1], has no iscrowd"),
    ]:
        content = json.loads(good)
        change(content["annotations"][1]["segments_info"][1])
        path.write_text(json.dumps(content))
        said = check(config, root, "val")
        assert f"annotations[1], {words}" in said
    path.write_text(good)
    map_path = root / "annotations" / "panoptic_val2017" / f"{1:012d}.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(map_path)
    assert "has 32x32 pixels, but its picture has 96x64" in check(config, root, "val")
    map_path.unlink()
    assert f"label map {map_path} does not exist" in check(config, root, "val")


def test_a_detector_is_refused_before_a_work_dir_is_made(refused, cells, tmp_path):
    """The commands `train`, `test` and `compare` refuse such data with one line."""
    copy = broken(cells, tmp_path, "train", first("annotations", area=None))
    (copy / "images" / "test" / "0.jpg").write_bytes(b"")
    root, work = ("--data-root", copy), ("--work-dir", tmp_path / "work")
    assert "annotations[1] (id 2) has no area" in refused("train", BOXES, *root, *work)
    backbone = ("--backbone", "resnet10t,out_indices=(2, 3, 4)", "--out", tmp_path / "work", "--max-epochs", 1)
    assert "annotations[1] (id 2) has no area" in refused("compare", BOXES, *root, *backbone)
    assert "0.jpg is empty" in refused("test", BOXES, tmp_path / "none.pth", *root)
    assert not (tmp_path / "work").exists()
