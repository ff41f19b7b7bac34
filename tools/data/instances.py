"""Pictures with instance masks in COCO's format, as maps of instances.

images/{train,val}/NAME.jpg                  or another suffix of pictures
annotations/instances_{train,val}.json       COCO's instances: polygons or run lengths
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from terrazzo._pictures import spread
from terrazzo.errors import InputError, first_line
from terrazzo.tools.data.pictures import Picture


@dataclass(frozen=True)
class InstanceSplit:
    """Pictures and their instances.

    Attributes:
        pictures: in the order of the file; each has an instance.
        file: the annotations, read by pycocotools.
        ids: COCO's id of each picture.
        categories: names of the categories, by COCO's id.
    """

    pictures: Sequence[Picture]
    file: Any
    ids: Sequence[int]
    categories: dict[int, str]

    def instances(self, index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """What a picture shows, by pixel; smaller instances lie on larger ones, and crowds are left out.

        Args:
            index: of the picture.
            size: (H, W) of the picture.

        Returns:
            The number of the instance (H, W), from 1 on, 0 where there is none; and the category's id by number, with
            0 for number 0.

        Raises:
            InputError: the annotations are for another size, or a mask cannot be read.
        """
        facts = self.file.imgs[self.ids[index]]
        if (facts["height"], facts["width"]) != size:
            raise InputError(
                f"{self.pictures[index].path} has {size[0]}x{size[1]} pixels, and its annotations are for "
                f"{facts['height']}x{facts['width']}"
            )
        marks = [mark for mark in self.file.imgToAnns[self.ids[index]] if not mark.get("iscrowd")]
        numbers, categories = np.zeros(size, np.int32), [0]
        masks = [self._mask(mark) for mark in marks]
        for mask, mark in sorted(zip(masks, marks), key=lambda pair: -pair[1].get("area", pair[0].sum())):
            numbers[mask] = len(categories)
            categories.append(mark["category_id"])
        return numbers, np.array(categories)

    def _mask(self, mark: dict[str, Any]) -> np.ndarray:
        try:
            return self.file.annToMask(mark) > 0
        except Exception as error:  # pycocotools raises whatever comes
            raise InputError(f"the mask {mark.get('id')} cannot be read: {first_line(error)}") from error


def read_instances(root: Path, split: str, most: int | None = None) -> InstanceSplit:
    """The pictures of a split that have an instance.

    Args:
        root: the data set.
        split: "train" or "val".
        most: take at most this many pictures, spread over all.

    Raises:
        InputError: something is missing or damaged, or no picture has an instance.
    """
    path = root / "annotations" / f"instances_{split}.json"
    if not path.is_file():
        raise InputError(
            f"{path} does not exist; name a folder with annotations/instances_{{train,val}}.json and "
            "images/{train,val}"
        )
    from pycocotools.coco import COCO

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            file = COCO(str(path))
        names = {category["id"]: category["name"] for category in file.dataset["categories"]}
        ids = [
            number for number in file.imgs if any(not mark.get("iscrowd") for mark in file.imgToAnns.get(number, ()))
        ]
        paths = [root / "images" / split / file.imgs[number]["file_name"] for number in ids]
        lacking = [
            f"{kind} {facts.get('id')} lacks '{key}'"
            for number in ids
            for kind, keys, found in (
                ("picture", ("height", "width"), [file.imgs[number]]),
                ("annotation", ("category_id",), file.imgToAnns[number]),
            )
            for facts in found
            for key in keys
            if key not in facts
        ]
        if lacking:
            raise ValueError(lacking[0])
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
        raise InputError(f"{path} is not in COCO's format: {reason}") from error
    if not ids:
        raise InputError(f"{path} has no picture with an instance")
    places = spread(range(len(ids)), most or len(ids))
    pictures = [Picture(paths[place], paths[place].stem) for place in places]
    for picture in pictures:
        picture.read()
    return InstanceSplit(pictures, file, [ids[place] for place in places], names)
