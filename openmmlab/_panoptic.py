"""A replacement for `panopticapi`: mmdet reads and scores COCO panoptic data with it, and PyPI does not have it.

It holds only the names that mmdet imports. It was written from the definition of panoptic quality in Kirillov et al.,
"Panoptic Segmentation" (2019), equations 1 and 2, and from the description of COCO's format.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

VOID = 0
"""The number of the pixels that belong to no segment."""

OFFSET = 256**3
"""Larger than any segment's number, so that two numbers fit into one: truth * OFFSET + prediction."""


def rgb2id(colours: np.ndarray) -> np.ndarray:
    """The numbers of segments, (...) int32, that colours (..., 3) stand for: R + 256 G + 256^2 B."""
    red, green, blue = np.moveaxis(np.asarray(colours, np.int32), -1, 0)
    return red + 256 * green + 256**2 * blue


def id2rgb(numbers: np.ndarray) -> np.ndarray:
    """The colours, (..., 3) uint8, that stand for numbers of segments (...) below `OFFSET`."""
    numbers = np.asarray(numbers)
    return np.stack([numbers // 256**place % 256 for place in range(3)], -1).astype(np.uint8)


@dataclass
class Matches:
    """How the segments of one category were found. A pair of segments matches if its IoU is above one half.

    Attributes:
        iou: the sum of the IoU of matched pairs.
        tp: matched pairs.
        fp: predicted segments without a match.
        fn: true segments without a match.
    """

    iou: float = 0.0
    tp: int = 0
    fp: int = 0
    fn: int = 0

    def __iadd__(self, other: "Matches") -> "Matches":
        self.iou += other.iou
        self.tp += other.tp
        self.fp += other.fp
        self.fn += other.fn
        return self

    def is_empty(self) -> bool:
        """Whether the category occurs neither in the truth nor among the predictions."""
        return self.tp + self.fp + self.fn == 0

    def qualities(self) -> dict[str, float]:
        """Panoptic quality `pq` and its factors `sq` (segmentation) and `rq` (recognition); 0 without segments."""
        segments = self.tp + self.fp / 2 + self.fn / 2
        return {
            "pq": self.iou / segments if segments else 0.0,
            "sq": self.iou / self.tp if self.tp else 0.0,
            "rq": self.tp / segments if segments else 0.0,
        }


class PQStat:
    """The matches of every category, by its number; `+=` adds the matches of several pictures or processes."""

    def __init__(self):
        self.matches: defaultdict[int, Matches] = defaultdict(Matches)

    def __getitem__(self, category: int) -> Matches:
        return self.matches[category]

    def __iadd__(self, other: "PQStat") -> "PQStat":
        for category, matches in other.matches.items():
            self.matches[category] += matches
        return self

    def pq_average(
        self, categories: Mapping[int, dict], isthing: bool | None
    ) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
        """Qualities over all categories, and of each category.

        Args:
            categories: COCO's categories by number; `isthing` of each is 1 for things and 0 for stuff.
            isthing: True for things only, False for stuff only, None for all.

        Returns:
            `pq`, `sq` and `rq` as means over the `n` categories that occur, and `n`; without categories the means are
            NaN. Then `pq`, `sq` and `rq` of each category, 0 if it does not occur.
        """
        chosen = [
            number for number, category in categories.items() if isthing is None or bool(category["isthing"]) == isthing
        ]
        single = {number: self[number].qualities() for number in chosen}
        occurring = [single[number] for number in chosen if not self[number].is_empty()]
        count = len(occurring)
        average = {
            key: sum(qualities[key] for qualities in occurring) / count if count else float("nan")
            for key in ("pq", "sq", "rq")
        }
        return {**average, "n": count}, single


MODULES: dict[str, dict[str, Any]] = {
    "panopticapi": {},
    "panopticapi.evaluation": {"OFFSET": OFFSET, "VOID": VOID, "PQStat": PQStat},
    "panopticapi.utils": {"rgb2id": rgb2id, "id2rgb": id2rgb},
}
"""The names in each module."""
