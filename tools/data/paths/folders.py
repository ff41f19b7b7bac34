"""Path images on disk, written whole, and read again only if they are what is asked for.

A folder of pairs has a folder for each answer, as torchvision, timm and the classification configs read it:

    {train,test}/{different,same}/NAME.png

A folder of the dense form has label maps, as the segmentation configs read them:

    images/{train,val}/NAME.png      the images
    labels/{train,val}/NAME.png      0 background, 1 the path between the discs, 2 other contours
    instances/{train,val}/NAME.png   16 bits: the number of the contour; 1 and 2 are the long ones
    classes.json                     names, palette and ignore index of the labels

Both have `paths.csv`, what is known about each image, and `paths.json`, what was asked for.
"""

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from terrazzo.errors import InputError
from terrazzo.tools.data.paths import VERSION, PathImage, paths
from terrazzo.tools.files import folder_written_whole

ANSWERS = ("different", "same")
CLASSES = ("background", "path", "other")
PALETTE = ((0, 0, 0), (240, 228, 66), (0, 114, 178))
IGNORE_INDEX = 255
RECORD = "paths.json"
_PREFIX = "path_"
_COLUMNS = ("split", "name", "label", "first_x", "first_y", "last_x", "last_y", "distractors")


@dataclass(frozen=True)
class Asked:
    """What a folder of path images holds.

    Attributes:
        size: height and width in pixels.
        dense: whether it is the dense form.
        counts: images of each split; splits are numbered in this order.
        contour: paddles of a long contour; None for the published number.
        seed: the seed of all images.
        version: of the generator.
    """

    size: int
    dense: bool
    counts: Mapping[str, int]
    contour: int | None = None
    seed: int = 0
    version: int = VERSION


def write_paths(root: Path, asked: Asked, workers: int = 1, done: Callable[[], None] = lambda: None) -> None:
    """Write images into an existing folder.

    Args:
        root: the folder.
        asked: what to write.
        workers: processes that make images.
        done: called after each image.

    Raises:
        InputError: there are no settings for the size.
    """
    rows = []
    for number, (split, count) in enumerate(asked.counts.items()):
        for folder in _folders(asked.dense, split):
            (root / folder).mkdir(parents=True, exist_ok=True)
        made = paths(asked.size, count, asked.contour, asked.seed, split=number, dense=asked.dense, workers=workers)
        for index, image in enumerate(made):
            name = f"{_PREFIX}{index:06d}.png"
            for folder, picture in _pictures(asked.dense, split, image):
                Image.fromarray(picture).save(root / folder / name)
            discs = (f"{x:.3f}" for x in image.discs.flat)
            rows.append((split, name, image.label, *discs, image.distractors))
            done()
    if asked.dense:
        meta = {"classes": CLASSES, "palette": PALETTE, "ignore_index": IGNORE_INDEX}
        (root / "classes.json").write_text(json.dumps(meta, indent=2) + "\n")
    with open(root / "paths.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows((_COLUMNS, *rows))
    (root / RECORD).write_text(json.dumps(asdict(asked), indent=2) + "\n")


def _folders(dense: bool, split: str) -> list[str]:
    kinds = ("images", "labels", "instances")
    return [f"{kind}/{split}" for kind in kinds] if dense else [f"{split}/{answer}" for answer in ANSWERS]


def _pictures(dense: bool, split: str, image: PathImage) -> list[tuple[str, np.ndarray]]:
    if dense:
        return list(zip(_folders(dense, split), (image.image, image.classes, image.instances)))
    return [(f"{split}/{ANSWERS[image.label]}", image.image)]


def kept_paths(root: Path, asked: Asked, workers: int = 1, done: Callable[[], None] = lambda: None) -> Path:
    """The folder with the images, written now if it is not there or empty.

    Raises:
        InputError: the folder is there and holds something else, or not all images.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        with folder_written_whole(root) as temporary:
            write_paths(temporary, asked, workers, done)
        return root
    try:
        record = json.loads((root / RECORD).read_text())
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict):
        raise InputError(f"{root} is there, and holds no path images; name another folder")
    wanted = asdict(asked)
    wrong = [f"{key} {record.get(key)} and not {value}" for key, value in wanted.items() if record.get(key) != value]
    if wrong:
        raise InputError(f"{root} holds other path images: {', '.join(wrong)}; name another folder, or remove it")
    _check_complete(root, asked)
    return root


def _check_complete(root: Path, asked: Asked) -> None:
    """InputError if pictures were lost or came in addition since the folder was written."""
    for split, count in asked.counts.items():
        folders = _folders(asked.dense, split)
        for together in [[folder] for folder in folders] if asked.dense else [folders]:
            found = sum(len(_files(root / folder)) for folder in together)
            if found != count:
                raise InputError(f"{root} has {found} of {count} images in {' and '.join(together)}; remove it")


def read_pairs(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, H, W) uint8 and labels (n,) of a split, in the order of their numbers."""
    found = sorted(
        (path.name, path, label) for label, answer in enumerate(ANSWERS) for path in _files(root / split / answer)
    )
    return np.stack([_read(path) for _, path, _ in found]), np.array([label for *_, label in found])


def read_dense(root: Path, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, classes, both (n, H, W) uint8, and instances (n, H, W) uint16 of a split."""
    images, labels, instances = (
        np.stack([_read(path) for path in sorted(_files(root / folder))]) for folder in _folders(True, split)
    )
    return images, labels, instances


def _files(folder: Path) -> list[Path]:
    """The pictures of a folder, without files that a system puts there, such as .DS_Store and ._path_000000.png."""
    return list(folder.glob(f"{_PREFIX}*.png"))


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)
