"""Whether COCO's annotations hold what mmdet reads and pycocotools evaluates with, for the classes of a config."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
from mmengine.config import Config

from terrazzo.errors import InputError, first_line
from terrazzo.tools.data.checks.label_maps import COLOURS, check_label_maps
from terrazzo.tools.data.checks.masks import mask_fault
from terrazzo.tools.data.checks.pictures import Sample, check_pictures
from terrazzo.tools.data.checks.remembered import look
from terrazzo.tools.data.checks.source import Source, and_more, evaluators, metric_name, near

_NAMES_SAID = 12
_POINTS_OF_A_BOX = 4


@dataclass(frozen=True)
class Needs:
    """What is read from an annotation file.

    Attributes:
        classes: the names of the config's classes, in order; empty for all.
        labels: whether boxes are needed; they are not if results are only written to files.
        masks: whether the masks of the boxes that are kept are read.
        all_masks: whether the masks of all boxes are read, as the evaluation of masks does.
        crowds: whether every annotation must have `iscrowd`, as COCO's evaluation requires.
        panoptic: whether annotations are segments of panoptic pictures.
        drop_empty: whether pictures without boxes are dropped.
        min_size: pictures with a shorter side are dropped.
    """

    classes: tuple[str, ...] = ()
    labels: bool = True
    masks: bool = False
    all_masks: bool = False
    crowds: bool = False
    panoptic: bool = False
    drop_empty: bool = False
    min_size: int = 0


class AnnotationFacts(NamedTuple):
    """What is known about an annotation file.

    Attributes:
        fault: what is wrong with it; empty for nothing.
        notice: what a user should know although it can be used.
        images: identifier, file name, width, height of every picture, and whether it has annotations.
    """

    fault: str
    notice: str
    images: list


def check_coco(cfg: Config, source: Source) -> None:
    """Check the annotations and pictures of a data set in COCO's format, and what its metrics read.

    Raises:
        InputError: the file, an entry of it or a picture cannot be used; or it has other classes than the config.
    """
    panoptic = source.kind.COCOAPI.__name__ == "COCOPanoptic"
    path = source.path(source.settings.get("ann_file") or "")
    metrics = [
        (key, settings)
        for key, settings in evaluators(cfg, source.split)
        if metric_name(settings) == ("CocoPanopticMetric" if panoptic else "CocoMetric")
    ]
    measured = [(key, settings) for key, settings in metrics if not settings.get("format_only")]
    reading = Needs(
        classes=tuple(source.classes()),
        labels=not source.evaluated or bool(measured) or not metrics,
        masks=not panoptic and bool((source.step("LoadAnnotations") or {}).get("with_mask")),
        panoptic=panoptic,
        **_filter(source),
    )
    own = [settings for _, settings in measured if _same(settings.get("ann_file"), path)]
    facts = _facts(path, _measuring(reading, own) if own else reading, f"{source.key}.ann_file")
    if facts.notice:
        click.echo(f"warning: {path}: {facts.notice}", err=True)
    for key, settings in metrics:
        other = settings.get("ann_file")
        if other and not _same(other, path):
            needs = _measuring(reading, [settings] if not settings.get("format_only") else [])
            truth = _facts(Path(other), needs, f"{key}.ann_file")
            known = {identifier for identifier, *_ in truth.images}
            unknown = [identifier for identifier, *_ in facts.images if identifier not in known]
            if unknown:
                raise InputError(
                    f"{key}.ann_file {other} has no picture with the id {unknown[0]!r} of {path}"
                    f"{and_more(len(unknown))}; name the annotations of the same pictures in both"
                )
    folder = source.prefix("img")
    samples = [
        Sample(folder / name, f"{path.name}, image {identifier!r},", (width, height), bool(annotated))
        for identifier, name, width, height, annotated in facts.images
    ]
    pictures = check_pictures(source, samples) if source.step("LoadImageFromFile") else [None] * len(samples)
    loader = source.step("LoadPanopticAnnotations" if panoptic else "LoadAnnotations")
    if loader and loader.get("with_seg", panoptic) and source.prefix("seg") != source.path(""):
        suffix = source.settings.get("seg_map_suffix") or ".png"
        maps = [_map_of(image[1], panoptic, suffix, source.prefix("seg")) for image in facts.images]
        check_label_maps(source, COLOURS if panoptic else loader.get("imdecode_backend") or "cv2", maps, pictures)


def examine(needs: Needs, path: Path) -> AnnotationFacts:
    """The facts about an annotation file; `needs` says what it must have."""
    try:
        content = read_json(path)
        images = _images(content)
        categories = _categories(content, needs)
        notice = _order(categories, needs)
        if "annotations" in content or needs.labels:
            _annotations(content, images, categories, needs)
    except InputError as error:
        return AnnotationFacts(str(error), "", [])
    annotated = {annotation["image_id"] for annotation in content.get("annotations") or ()}
    return AnnotationFacts(
        "",
        notice,
        [
            [identifier, image["file_name"], image["width"], image["height"], int(identifier in annotated)]
            for identifier, image in images.items()
        ],
    )


def read_json(path: Path) -> dict:
    """The object in a JSON file in UTF-8, with a byte-order mark or without; InputError says what is wrong."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"it is not in UTF-8 ({first_line(error)}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"it cannot be read: {first_line(error)}") from None
    if not text.strip():
        raise InputError("it is empty; it must be COCO's JSON, with images, annotations and categories")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"it is not readable JSON, and may be cut short: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise InputError(
            f"its top level is a {_kind(content)}; COCO's JSON is an object with images, annotations and categories"
        )
    return content


def _facts(path: Path, needs: Needs, key: str) -> AnnotationFacts:
    (facts,) = look(f"annotations: {needs}", partial(examine, needs), AnnotationFacts, [path])
    if facts is None:
        raise InputError(f"annotation file {path} does not exist; {near(path)}, or set {key}")
    if facts.fault:
        raise InputError(f"annotation file {path}: {facts.fault} (named by {key})")
    return facts


def _filter(source: Source) -> dict:
    """What mmdet drops from training data, but not in `test_mode`."""
    settings = source.settings.get("filter_cfg") or {}
    if source.settings.get("test_mode"):
        return {}
    return {"drop_empty": bool(settings.get("filter_empty_gt")), "min_size": settings.get("min_size") or 0}


def _measuring(reading: Needs, metrics: Sequence[dict]) -> Needs:
    """`reading`, plus the needs of metrics that read the file themselves."""
    kinds = [settings.get("metric") or "bbox" for settings in metrics]
    names = [name for kind in kinds for name in ([kind] if isinstance(kind, str) else kind)]
    return Needs(**{**vars(reading), "crowds": bool(metrics), "all_masks": "segm" in names and not reading.panoptic})


def _same(named: str | None, path: Path) -> bool:
    return bool(named) and os.path.abspath(named) == os.path.abspath(path)


def _map_of(name: str, panoptic: bool, suffix: str, folder: Path) -> Path:
    """Where mmdet looks for the map of a picture."""
    return folder / (name.replace(".jpg", ".png") if panoptic else name.rsplit(".", 1)[0] + suffix)


def _images(content: dict) -> dict[Any, dict]:
    """The pictures by their identifiers."""
    images: dict[Any, dict] = {}
    for entry, image in _entries(content, "images"):
        identifier = _identifier(entry, image, "id")
        if identifier in images:
            raise InputError(f"{entry} has the id of another image; ids must differ")
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            raise InputError(f"{entry} {_lacks(image, 'file_name')}; it names the picture's file")
        for side in ("width", "height"):
            if not _is_number(image.get(side)) or image[side] < 1:
                raise InputError(f"{entry} {_lacks(image, side)}; it is the picture's {side} in pixels")
        images[identifier] = image
    if not images:
        raise InputError("it has no images; the data set is empty")
    return images


def _categories(content: dict, needs: Needs) -> dict[Any, str]:
    """The names of the categories by their identifiers."""
    categories: dict[Any, str] = {}
    for entry, category in _entries(content, "categories"):
        identifier = _identifier(entry, category, "id")
        if identifier in categories:
            raise InputError(f"{entry} has the id of another category; ids must differ")
        if not isinstance(category.get("name"), str):
            raise InputError(f"{entry} {_lacks(category, 'name')}; it is the name of a class")
        if needs.panoptic and "isthing" not in category:
            raise InputError(f"{entry} has no isthing; it is 1 for things and 0 for stuff")
        categories[identifier] = category["name"]
    names = list(categories.values())
    unknown = [name for name in needs.classes if name not in names]
    if unknown:
        listed = ", ".join(unknown[:_NAMES_SAID]) + (", ..." if len(unknown) > _NAMES_SAID else "")
        own = ", ".join(names[:_NAMES_SAID]) + (", ..." if len(names) > _NAMES_SAID else "")
        raise InputError(
            f"the config has {len(needs.classes)} classes, but this file does not have {listed}; its {len(names)} are: "
            f"{own}; set metainfo.classes of the data set and num_classes of the heads"
        )
    twice = [name for name, count in Counter(names).items() if count > 1 and name in needs.classes]
    if twice:
        raise InputError(f"categories has {twice[0]!r} more than once; give each class one category")
    return categories


def _order(categories: dict[Any, str], needs: Needs) -> str:
    """A notice if mmdet, which numbers classes in the order of the file, will name them in another order."""
    order = [name for name in categories.values() if name in needs.classes]
    if order == list(needs.classes):
        return ""
    return (
        f"its categories are in the order {', '.join(order[:_NAMES_SAID])}, and mmdet numbers classes by it; list "
        "metainfo.classes in this order, or predictions bear the wrong names"
    )


def _annotations(content: dict, images: dict, categories: dict, needs: Needs) -> None:
    """Check every annotation, and that some are left to train or evaluate with."""
    wanted = {identifier for identifier, name in categories.items() if not needs.classes or name in needs.classes}
    seen: set = set()
    kept, filled = 0, set()
    for entry, annotation in _entries(content, "annotations"):
        image = images.get(_reference(entry, annotation, "image_id", images, "image"))
        filled.add(annotation["image_id"])
        if needs.panoptic:
            kept += _segments(entry, annotation, categories, wanted, needs)
            continue
        identifier = _identifier(entry, annotation, "id")
        if identifier in seen:
            raise InputError(f"{entry} has the id of another annotation; ids must differ")
        seen.add(identifier)
        category = _reference(entry, annotation, "category_id", categories, "category")
        if needs.crowds and annotation.get("iscrowd") not in (0, 1):
            raise InputError(f"{entry} {_lacks(annotation, 'iscrowd')}; COCO's evaluation reads 0 or 1 there")
        if annotation.get("ignore") and not needs.crowds:
            continue
        inside = _box(entry, annotation, image)
        used = inside and category in wanted and not annotation.get("ignore")
        kept += used
        if needs.all_masks or (needs.masks and used):
            fault = mask_fault(annotation.get("segmentation"), image["height"], image["width"])
            if fault:
                raise InputError(f"{entry} has a segmentation that cannot be read: {fault}")
    if not kept and needs.labels:
        what = "segment" if needs.panoptic else "box"
        raise InputError(
            f"it has no {what} of the config's classes that can be used, among {len(content['annotations'])} "
            "annotations; a box is used if it is in its picture and has a width, a height and an area"
        )
    left = [
        identifier
        for identifier, image in images.items()
        if min(image["width"], image["height"]) >= needs.min_size and (identifier in filled or not needs.drop_empty)
    ]
    if not left:
        raise InputError(
            f"filter_cfg drops every picture: filter_empty_gt is {needs.drop_empty}, and min_size is {needs.min_size}"
        )


def _box(entry: object, annotation: dict, image: dict) -> bool:
    """Check a box and its area, and say whether mmdet uses it; it drops boxes that are empty or outside the picture."""
    box = annotation.get("bbox")
    if "bbox" not in annotation:
        raise InputError(f"{entry} has no bbox; it must have [x, y, width, height]")
    if not isinstance(box, list) or len(box) != _POINTS_OF_A_BOX or not all(map(_is_number, box)):
        raise InputError(f"{entry} has the bbox {_short(box)}; it must be [x, y, width, height], in numbers")
    if not _is_number(annotation.get("area")):
        raise InputError(f"{entry} {_lacks(annotation, 'area')}; it is the area of the object in pixels")
    x, y, width, height = box
    overlap = min(x + width, image["width"]) > max(x, 0) and min(y + height, image["height"]) > max(y, 0)
    return overlap and annotation["area"] > 0 and width >= 1 and height >= 1


def _segments(entry: object, annotation: dict, categories: dict, wanted: set, needs: Needs) -> int:
    """Check the segments of a panoptic picture, and count the segments of wanted categories."""
    segments = annotation.get("segments_info")
    if not isinstance(segments, list):
        raise InputError(f"{entry} {_lacks(annotation, 'segments_info')}; it is the list of its segments")
    if needs.crowds and not isinstance(annotation.get("file_name"), str):
        raise InputError(f"{entry} {_lacks(annotation, 'file_name')}; it names the picture of the segments")
    for index, segment in enumerate(segments):
        place = f"{entry}, segments_info[{index}],"
        if not isinstance(segment, dict):
            raise InputError(f"{place} is a {_kind(segment)}; it must be an object")
        _identifier(place, segment, "id")
        if _reference(place, segment, "category_id", categories, "category") not in wanted:
            raise InputError(f"{place} has a category that is not a class of the config")
        if needs.crowds and segment.get("iscrowd") not in (0, 1):
            raise InputError(f"{place} {_lacks(segment, 'iscrowd')}; the panoptic metric reads 0 or 1 there")
        _box(place, segment, {"width": math.inf, "height": math.inf})
    return len(segments)


class _Entry(NamedTuple):
    """An object in a list of the file; `str` gives its name in messages."""

    key: str
    index: int
    item: dict

    def __str__(self) -> str:
        identifier = f" (id {_short(self.item['id'])})" if "id" in self.item else ""
        return f"{self.key}[{self.index}]{identifier}"


def _entries(content: dict, key: str) -> Iterator[tuple[_Entry, dict]]:
    """The objects in a list of the file, and what to call each."""
    found = content.get(key)
    if not isinstance(found, list):
        have = ", ".join(map(str, list(content)[:_NAMES_SAID])) or "nothing"
        raise InputError(
            f"it has no list of {key}; its top level has {have}"
            + ("" if key != "annotations" else "; for a test set without annotations, set the metric's format_only")
        )
    for index, item in enumerate(found):
        if not isinstance(item, dict):
            raise InputError(f"{key}[{index}] is a {_kind(item)}; it must be an object")
        yield _Entry(key, index, item), item


def _identifier(entry: object, item: dict, key: str) -> Any:
    value = item.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise InputError(f"{entry} {_lacks(item, key)}; it must be a whole number")
    return value


def _reference(entry: object, item: dict, key: str, known: dict, what: str) -> Any:
    """The identifier of another entry, which must exist."""
    value = _identifier(entry, item, key)
    if value in known:
        return value
    other = str(value) if not isinstance(value, str) else int(value) if value.lstrip("-").isdigit() else None
    hint = f"; the {what} has {other!r}: write both as numbers" if other in known else ""
    raise InputError(f"{entry} has {key} {value!r}, which no {what} has as its id{hint}")


def _lacks(item: dict, key: str) -> str:
    return f"has {key} {_short(item[key])}" if key in item else f"has no {key}"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
