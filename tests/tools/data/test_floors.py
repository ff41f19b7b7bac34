"""The synthetic floors: a seed gives the same floors, and labels, boxes, masks and crops agree."""

import json

import numpy as np
import pytest
from PIL import Image

from terrazzo.errors import InputError
from terrazzo.tools.data import rle
from terrazzo.tools.data.floors import CHIP_SIZE, CLASSES, PALETTE, STONES, FloorMaker, write_floors


def test_same_seed_same_floor():
    first, second = FloorMaker(4, 64), FloorMaker(4, 64)
    for _ in range(2):
        one, other = first.make(), second.make()
        assert np.array_equal(one.image, other.image)
        assert np.array_equal(one.labels, other.labels)
        assert one.stones == other.stones
    assert not np.array_equal(one.image, FloorMaker(5, 64).make().image)


@pytest.mark.long
def test_same_seed_same_files(tmp_path):
    one, other = (write_floors(tmp_path / name, train=2, val=1, size=48, seed=7) for name in ("one", "other"))
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.parametrize("size", [32, 75, 128])
def test_masks_agree_with_labels_and_boxes(size):
    maker = FloorMaker(seed=size, size=size)
    for _ in range(3):
        floor = maker.make()
        assert floor.image.shape == (size, size, 3)
        assert floor.image.dtype == np.uint8
        assert np.array_equal(floor.labels > 0, floor.instances > 0)
        assert len(floor.stones) >= 1
        for chip, (stone, (left, top, width, height)) in enumerate(zip(floor.stones, floor.boxes())):
            mask = floor.instances == chip + 1
            assert set(floor.labels[mask]) == {stone + 1}
            assert mask[top : top + height, left : left + width].sum() == mask.sum()
            assert mask[top].any()
            assert mask[top + height - 1].any()
            assert mask[:, left].any()
            assert mask[:, left + width - 1].any()


def test_chips_do_not_touch():
    floor = FloorMaker(seed=2).make()
    ids = floor.instances
    for one, other in ((ids[1:], ids[:-1]), (ids[:, 1:], ids[:, :-1])):
        assert not ((one != other) & (one > 0) & (other > 0)).any()


def test_every_stone_occurs():
    maker = FloorMaker(seed=0)
    seen = np.unique(np.concatenate([maker.make().labels.ravel() for _ in range(8)]))
    assert seen.tolist() == list(range(len(CLASSES)))


def test_layouts(floors):
    meta = json.loads((floors / "classes.json").read_text())
    assert meta["classes"] == list(CLASSES)
    assert len(meta["palette"]) == len(PALETTE) == len(CLASSES)
    for split, count in (("train", 6), ("val", 3)):
        names = sorted(path.name for path in (floors / "images" / split).iterdir())
        assert len(names) == count
        assert names == sorted(path.name for path in (floors / "labels" / split).iterdir())
        record = json.loads((floors / "annotations" / f"instances_{split}.json").read_text())
        assert [image["file_name"] for image in record["images"]] == names
        assert [category["name"] for category in record["categories"]] == list(STONES)
        for image in record["images"]:
            labels = np.asarray(Image.open(floors / "labels" / split / image["file_name"]))
            rebuilt = np.zeros_like(labels)
            for thing in record["annotations"]:
                if thing["image_id"] == image["id"]:
                    mask = rle.decode(thing["segmentation"])
                    assert mask.sum() == thing["area"]
                    rebuilt[mask] = thing["category_id"]
            assert np.array_equal(rebuilt, labels)
        chips = list((floors / "chips" / split).rglob("*.png"))
        assert {path.parent.name for path in chips} <= set(STONES)
        assert Image.open(chips[0]).size == (CHIP_SIZE, CHIP_SIZE)


def test_coco_tools_read_the_masks(floors):
    mask_tools = pytest.importorskip("pycocotools.mask")
    record = json.loads((floors / "annotations" / "instances_val.json").read_text())
    for thing in record["annotations"][:5]:
        runs = thing["segmentation"]
        packed = mask_tools.frPyObjects(runs, *runs["size"])
        assert np.array_equal(mask_tools.decode(packed).astype(bool), rle.decode(runs))
        assert mask_tools.toBbox(packed).tolist() == thing["bbox"]


@pytest.mark.parametrize("mask", [np.zeros((3, 4), bool), np.ones((3, 4), bool), np.eye(5, 3) > 0])
def test_run_lengths_round_trip(mask):
    runs = rle.encode(mask)
    assert sum(runs["counts"]) == mask.size
    assert np.array_equal(rle.decode(runs), mask)


def test_refuses_impossible_requests(tmp_path):
    with pytest.raises(InputError, match="at least 32"):
        FloorMaker(0, size=31)
    with pytest.raises(InputError, match="at least 1"):
        write_floors(tmp_path / "none", train=0)
    assert not (tmp_path / "none").exists()
