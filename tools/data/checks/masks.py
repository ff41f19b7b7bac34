"""Whether a mask in COCO's format can be read: polygons, or run lengths as a list or packed into text."""

import math
from typing import Any

_LEAST = 6
"""How many numbers the smallest polygon, a triangle, has."""
_BOX = 4
"""How many numbers pycocotools reads as a box, if they come first."""


def mask_fault(mask: Any, height: int, width: int) -> str:
    """What is wrong with `segmentation` of an annotation; empty for nothing.

    A mask of several polygons may have short ones among them, which mmdet leaves out; real annotations do.

    Args:
        mask: a list of polygons, each [x, y, x, y, ...], or {"size": [height, width], "counts": ...}.
        height: height of the picture.
        width: width of the picture.
    """
    if mask is None or mask == []:
        return "there is none, but masks are read; leave masks out of the config, or annotate them"
    if isinstance(mask, dict):
        return _runs_fault(mask, height, width)
    if not isinstance(mask, list):
        return "it must be a list of polygons, or an object with size and counts"
    for polygon in mask:
        if not isinstance(polygon, list):
            return "it must be a list of polygons, and each polygon a list: [[x, y, x, y, x, y]]"
        if not set(map(type, polygon)) <= {int, float} or not all(map(math.isfinite, polygon)):
            return "a polygon has a value that is not a finite number"
    if len(mask[0]) <= _BOX or not any(len(polygon) >= _LEAST and len(polygon) % 2 == 0 for polygon in mask):
        return f"a polygon has {len(mask[0])} numbers; it must have x and y of at least three points"
    return ""


def _runs_fault(mask: dict, height: int, width: int) -> str:
    size, counts = mask.get("size"), mask.get("counts")
    if size != [height, width]:
        return f"its size is {size}, but the picture's is {[height, width]}, height first"
    if isinstance(counts, str):
        counts = _unpacked(counts)
    if not isinstance(counts, list) or not set(map(type, counts)) <= {int} or min(counts, default=0) < 0:
        return "its counts are not run lengths: neither a list of whole numbers nor COCO's packed text"
    if sum(counts) != height * width:
        return f"its counts add up to {sum(counts)} pixels, but the picture has {height * width}"
    return ""


def _unpacked(text: str) -> list[int] | None:
    """The run lengths in COCO's packed text: five bits per character, a sign, differences from the third on."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return None if shift else counts
