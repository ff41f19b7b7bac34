"""supervision's `Detections` and `Classifications` from what `terrazzo infer` found."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from terrazzo._pictures import opened
from terrazzo.errors import InputError
from terrazzo.integrations._frameworks import framework
from terrazzo.tools.data import rle


def detections(found: Any, segments: np.ndarray | None = None) -> Any:
    """What a detector, a panoptic segmentor or a segmentor found, as `supervision.Detections`.

        found = detections("predictions/street.json")
        picture = supervision.MaskAnnotator().annotate(picture, found)

    Things have boxes, scores, classes and, if the model gives them, masks. A panoptic segmentor's segments and the
    classes of a segmentor have masks and boxes around them, and no scores. `data["class_name"]` has the names.

    Args:
        found: A record of `terrazzo infer` (the JSON file's path or its content), or a prediction: anything with a
            `record`, and with `labels` or `segments` for a segmentor.
        segments: (H, W) numbers of segments or classes, as in NAME.segments.png and NAME.labels.png; None to read them
            from the prediction, or from the file beside the JSON file.

    Raises:
        BackendError: supervision is not installed.
        InputError: The record is a classifier's, or a segmentor's without its map.
    """
    supervision = framework("supervision", "supervision")
    record, pixels = _opened(found)
    pixels = pixels if segments is None else segments
    if record["task"] == "detection":
        things = record["things"]
        masks = [rle.decode(thing["mask"]) for thing in things if "mask" in thing]
        if not things:
            return supervision.Detections.empty()
        return _detections(supervision, things, np.array([thing["box"] for thing in things], np.float32), masks)
    if record["task"] == "classification":
        raise InputError("a classifier finds no boxes and no masks: use classifications(record)")
    if pixels is None:
        raise InputError(
            f"the record of a {record['task']} model needs its map: give the array of the .labels.png or .segments.png "
            "file as segments, or the path of the JSON file beside it"
        )
    if record["task"] == "panoptic":
        things = [(entry["id"], entry) for entry in record["segments"]]
    else:
        things = [
            (index, {"label": name, "index": index})
            for index, name in enumerate(record["classes"])
            if record["shares"].get(name)
        ]
    masks = [pixels == number for number, _ in things]
    if not things:
        return supervision.Detections.empty()
    boxes = supervision.mask_to_xyxy(np.stack(masks)).astype(np.float32)
    return _detections(supervision, [entry for _, entry in things], boxes, masks)


def classifications(found: Any) -> Any:
    """The likeliest classes of a picture, as `supervision.Classifications`.

    Args:
        found: A record of `terrazzo infer` (the JSON file's path or its content), or a prediction with a `record`.

    Raises:
        BackendError: supervision is not installed.
        InputError: The record is not a classifier's.
    """
    supervision = framework("supervision", "supervision")
    record, _ = _opened(found)
    if record["task"] != "classification":
        raise InputError(f"this is the record of a {record['task']} model: use detections(record)")
    return supervision.Classifications(
        class_id=np.array([entry["index"] for entry in record["top"]]),
        confidence=np.array([entry["score"] for entry in record["top"]]),
    )


def _detections(supervision: Any, things: list[dict], boxes: np.ndarray, masks: list[np.ndarray]) -> Any:
    scored = all("score" in thing for thing in things)
    return supervision.Detections(
        xyxy=boxes,
        mask=np.stack(masks) if masks else None,
        confidence=np.array([thing["score"] for thing in things]) if scored else None,
        class_id=np.array([thing["index"] for thing in things]),
        data={"class_name": np.array([thing["label"] for thing in things])},
    )


def _opened(found: Any) -> tuple[Mapping[str, Any], np.ndarray | None]:
    """The record, and the map of classes or segments if it is known."""
    if isinstance(found, str | Path):
        path = Path(found)
        record = json.loads(path.read_text())
        kind = {"panoptic": "segments", "segmentation": "labels"}.get(record["task"])
        beside = path.with_name(f"{path.name.removesuffix('.json')}.{kind}.png")
        if not (kind and beside.exists()):
            return record, None
        with opened(beside) as image:
            return record, np.asarray(image)
    if isinstance(found, Mapping):
        return found, None
    segments = getattr(found, "segments", None)
    return found.record, getattr(found, "labels", None) if segments is None else segments
