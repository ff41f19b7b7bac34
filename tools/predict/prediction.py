"""What a model found, as a record and drawn on the picture; the same for every runtime."""

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from terrazzo.tools.data import rle
from terrazzo.tools.predict.draw import Colour, Mask, box_overlay, caption_bars, label_overlay, whole_or_part

TOP = 5
LEGEND_ENTRIES = 16


@dataclass(frozen=True)
class Prediction:
    """What is known about one picture after a model has seen it.

    Attributes:
        record: JSON-ready facts.
        draw: makes the drawing.
        labels: (H, W) class indices, for a segmentor.
        segments: (H, W) numbers of segments as in the record, 0 for none, for a panoptic segmentor.
        restored: the picture that a restorer gives.
    """

    record: dict
    draw: Callable[[], Image.Image]
    labels: np.ndarray | None = None
    segments: np.ndarray | None = None
    restored: Image.Image | None = None

    @functools.cached_property
    def drawing(self) -> Image.Image:
        """The picture with the result on it; it is drawn at the first look."""
        return self.draw()


class Things(NamedTuple):
    """What a detector finds.

    Attributes:
        boxes: (N, 4) left, top, right, bottom in pixels.
        labels, scores: (N,), the surest first.
        masks: (N, H, W) booleans, or None.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None


T = TypeVar("T")


def by_shape(
    inputs: Sequence[T], shape: Callable[[T], Hashable], run: Callable[[list[T]], Sequence[Prediction]]
) -> list[Prediction]:
    """The predictions of inputs, in their order; inputs of one shape run together, so that no input is padded."""
    places: dict[Hashable, list[int]] = {}
    for place, item in enumerate(inputs):
        places.setdefault(shape(item), []).append(place)
    found: dict[int, Prediction] = {}
    for members in places.values():
        found.update(zip(members, run([inputs[place] for place in members]), strict=True))
    return [found[place] for place in range(len(inputs))]


def class_prediction(image: Image.Image, scores: np.ndarray, names: Sequence[str] | None) -> Prediction:
    """The five likeliest classes.

    Args:
        image: the picture.
        scores: (classes,), adding up to 1.
        names: class names; None for numbers.
    """
    order = np.argsort(-scores, kind="stable")[:TOP]
    top = [
        {"label": name_of(int(index), names), "index": int(index), "score": round(float(scores[index]), 6)}
        for index in order
    ]
    lines = [(entry["label"], entry["score"]) for entry in top]
    return Prediction({"task": "classification", "top": top}, lambda: caption_bars(image, lines))


def label_prediction(
    image: Image.Image, labels: np.ndarray, names: Sequence[str], colours: Sequence[Colour]
) -> Prediction:
    """A class for every pixel.

    Args:
        image: the picture.
        labels: (H, W) class indices.
        names, colours: of every class.
    """
    counts = np.bincount(labels.ravel(), minlength=len(names))[: len(names)]
    record = label_record(counts, labels.size, names)
    shares = record["shares"]
    kept = labels.astype(np.uint8 if len(names) <= 256 else np.uint16)
    return Prediction(record, lambda: label_overlay(image, labels, names, colours, _legend(shares)), kept)


def label_record(counts: np.ndarray, pixels: int, names: Sequence[str]) -> dict:
    """The record of a segmentation.

    Args:
        counts: pixels of each class.
        pixels: of the picture.
        names: of every class.
    """
    return {"task": "segmentation", "classes": list(names), "shares": _shares(counts, pixels, names)}


def panoptic_prediction(
    image: Image.Image,
    values: np.ndarray,
    offset: int,
    things: int,
    names: Sequence[str],
    colours: Sequence[Colour],
) -> Prediction:
    """A segment for every pixel.

    Args:
        image: the picture.
        values: (H, W) class + offset * number of the thing; classes beyond the names have no segment.
        offset: the offset in `values`.
        things: how many of the first classes are things.
        names, colours: of every class.
    """
    labels = np.minimum(values % offset, len(names))
    found, counts = np.unique(values[labels < len(names)], return_counts=True)
    segments, records = np.zeros(values.shape, np.uint16), []
    for number, place in enumerate(np.argsort(-counts, kind="stable"), 1):
        segments[values == found[place]] = number
        index = int(found[place] % offset)
        share = round(float(counts[place] / values.size), 6)
        records.append({"id": number, "label": names[index], "index": index, "thing": index < things, "share": share})
    counts = np.bincount(labels.ravel(), minlength=len(names))[: len(names)]
    shares = _shares(counts, labels.size, names)
    record = {"task": "panoptic", "classes": list(names), "shares": shares, "segments": records}
    draw = functools.partial(label_overlay, image, labels, names, colours, _legend(shares), segments)
    return Prediction(record, draw, segments=segments)


def box_prediction(
    image: Image.Image,
    found: Things,
    names: Sequence[str],
    colours: Sequence[Colour],
    min_score: float,
    masks: Sequence[Mask] | None = None,
) -> Prediction:
    """Things, the surest first.

    Args:
        image: the picture.
        found: the things.
        names: class names; missing names become numbers.
        colours: taken in turn.
        min_score: the threshold that was applied, for the record.
        masks: N masks of parts of the picture, in place of the things' own.
    """
    shown: Any = masks if found.masks is None else found.masks.numpy()
    record = box_record(image.size, found, shown, names, min_score)
    texts, drawn = box_tags(record, colours)
    return Prediction(record, lambda: box_overlay(image, found.boxes.numpy(), texts, drawn, shown))


def box_record(
    size: tuple[int, int],
    found: Things,
    masks: np.ndarray | Sequence[Mask] | None,
    names: Sequence[str],
    min_score: float,
) -> dict:
    """The record of a detection; as `box_prediction`.

    Args:
        size: width and height of the picture.
        masks: (N, H, W) of bool, or N masks of parts of the picture, or None.
    """
    things = []
    for index, (box, label, score) in enumerate(
        zip(found.boxes.tolist(), found.labels.tolist(), found.scores.tolist())
    ):
        thing = {"label": name_of(label, names), "index": label, "score": round(score, 6)}
        thing["box"] = [round(value, 2) for value in box]
        if masks is not None:
            mask = whole_or_part(masks[index])
            thing["mask"] = rle.encode(mask.pixels, size[::-1], (mask.top, mask.left))
        things.append(thing)
    return {"task": "detection", "min_score": min_score, "things": things}


def box_tags(record: dict, colours: Sequence[Colour]) -> tuple[list[str], list[Colour]]:
    """What is written on the boxes of a detection's record, and their colours."""
    texts = [f"{thing['label']} {thing['score']:.2f}" for thing in record["things"]]
    return texts, [colours[thing["index"] % len(colours)] for thing in record["things"]]


def name_of(index: int, names: Sequence[str] | None) -> str:
    return names[index] if names and index < len(names) else f"class {index}"


def class_names(names: Sequence[str] | None, count: int) -> list[str]:
    """The given names, if there are enough, else numbers."""
    return list(names) if names and len(names) >= count else [f"class {index}" for index in range(count)]


def _shares(counts: np.ndarray, pixels: int, names: Sequence[str]) -> dict[str, float]:
    """The part of the picture that each class in it fills, largest first."""
    order = [index for index in np.argsort(-counts, kind="stable") if counts[index]]
    return {names[index]: round(float(counts[index] / pixels), 6) for index in order}


def _legend(shares: dict[str, float]) -> dict[str, float]:
    return dict(list(shares.items())[:LEGEND_ENTRIES])
