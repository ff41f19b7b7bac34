"""Pictures with label maps in CamVid's and the floors' layout, without OpenMMLab.

images/{train,val}/NAME.jpg    or another suffix of pictures
labels/{train,val}/NAME.png    the class of every pixel, in one channel of 8 bits
classes.json                   may be missing: {"classes": [...], "palette": [[r, g, b], ...], "ignore_index": 255}
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ImageOps

from terrazzo._pictures import check_same_turn, opened, upright_size
from terrazzo.errors import InputError, first_line
from terrazzo.tools.data.pictures import Picture, find_pictures

_IGNORED = 255


@dataclass(frozen=True)
class Split:
    """Pictures and their label maps.

    Attributes:
        pictures: known to be readable.
        labels: (H, W) uint8 for each picture, in its size.
    """

    pictures: Sequence[Picture]
    labels: Sequence[np.ndarray]


@dataclass(frozen=True)
class LabelledPictures:
    """A data set for segmentation.

    Attributes:
        classes: names.
        palette: colours as the data set gives them; None if it does not.
        ignored: the label of pixels that do not count.
        train, val: the splits.
    """

    classes: tuple[str, ...]
    palette: Sequence[Sequence[int]] | None
    ignored: int
    train: Split
    val: Split


def read_labelled(root: Path) -> LabelledPictures:
    """Read every picture and label map of a data set. Without classes.json, classes are numbers.

    Raises:
        InputError: something is missing or damaged, or a map does not fit its picture or the classes.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; name one with images/train, images/val, labels/train and labels/val")
    names, colours, ignored = _meta(root / "classes.json")
    train, val = (_read_split(root, split) for split in ("train", "val"))
    highest = max(_highest(split, ignored) for split in (train, val))
    if highest < 0:
        raise InputError(f"the label maps in {root / 'labels'} hold nothing but {ignored}, which is ignored")
    if names is None:
        names = tuple(f"class {number}" for number in range(highest + 1))
    elif highest >= len(names):
        raise InputError(
            f"a label map in {root / 'labels'} has class {highest}, but classes.json has {len(names)} classes, "
            f"0 to {len(names) - 1}; correct the map or classes.json"
        )
    return LabelledPictures(names, colours, ignored, train, val)


def _meta(path: Path) -> tuple[tuple[str, ...] | None, Sequence[Sequence[int]] | None, int]:
    """Names, colours and the ignored label."""
    if not path.exists():
        return None, None, _IGNORED
    try:
        meta = json.loads(path.read_text())
        names = tuple(str(name) for name in meta["classes"])
        colours = meta.get("palette") and [[int(part) for part in colour] for colour in meta["palette"]]
        return names, colours, int(meta.get("ignore_index", _IGNORED))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} does not describe classes: {first_line(error)}; see terrazzo demo's") from error


def _read_split(root: Path, split: str) -> Split:
    images, labels = root / "images" / split, root / "labels" / split
    for folder in (images, labels):
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; --data-root needs images/{split} and labels/{split}")
    pictures = find_pictures([images])
    return Split(pictures, [_read_map(picture.path, labels / f"{picture.path.stem}.png") for picture in pictures])


def _read_map(picture: Path, path: Path) -> np.ndarray:
    if not path.exists():
        raise InputError(f"the label map {path} does not exist, and its picture {picture} does")
    try:
        with opened(path) as image:
            values = np.array(ImageOps.exif_transpose(image))
    except InputError:
        raise
    except Exception as error:  # decoders fail in every way on damaged files
        raise InputError(f"the label map {path} is damaged or cut short: {first_line(error)}") from error
    if values.ndim != 2 or values.dtype != np.uint8:
        raise InputError(f"the label map {path} is not a map of class numbers: save it in one channel of 8 bits")
    check_same_turn(picture, path)
    width, height = upright_size(picture)
    if values.shape != (height, width):
        raise InputError(
            f"the label map {path} has {values.shape[1]}x{values.shape[0]} pixels, but its picture has "
            f"{width}x{height}; make the sizes equal"
        )
    return values


def _highest(split: Split, ignored: int) -> int:
    """The highest label that counts; -1 if none does."""
    return max(max((int(label) for label in np.unique(m) if label != ignored), default=-1) for m in split.labels)
