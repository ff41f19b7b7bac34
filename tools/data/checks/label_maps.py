"""Whether every label map belongs to a picture, has its size, and holds the numbers of the config's classes."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from mmengine.config import Config
from mmengine.registry import TRANSFORMS
from PIL import Image

from terrazzo.errors import InputError, first_line
from terrazzo.openmmlab.building import registered_class
from terrazzo.tools.data.checks.pictures import PictureFacts, Sample, check_pictures, read_ends
from terrazzo.tools.data.checks.remembered import look
from terrazzo.tools.data.checks.source import Source, and_more, evaluators, near

COLOURS = "colours"
"""Stands for a backend of mmcv: a panoptic map. Its colours number segments and say nothing about classes."""
_VALUES_KEPT, _VALUES_SAID = 256, 8
_IGNORED = 255
"""What OpenMMLab ignores unless a head says otherwise, and what `reduce_zero_label` makes of 0."""


class MapFacts(NamedTuple):
    """What is known about a label map: size, EXIF's orientation, its sorted values, and what is wrong.

    If there are very many values, only the lowest and the highest are kept.
    """

    width: int
    height: int
    orientation: int
    values: list[int]
    fault: str


def check_segmentation(cfg: Config, source: Source) -> None:
    """Check the pictures and label maps of a data set that is read like mmseg's.

    Raises:
        InputError: a picture or map is missing, damaged, of another size or turned, or a map has other classes.
    """
    dataset = _build(source)
    entries = dataset.data_list
    if not entries:
        _refuse_empty(source, dataset)
    if source.step("LoadImageFromFile"):
        # Pairs for the detection of changes have a second picture.
        seconds = [Path(entry["img_path2"]) for entry in entries if "img_path2" in entry]
        pictures = check_pictures(source, [Sample(Path(entry["img_path"])) for entry in entries])
        check_pictures(source, [Sample(path) for path in seconds])
    else:
        pictures = [None] * len(entries)
    loader = source.step("LoadAnnotations")
    if loader is None or entries[0].get("seg_map_path") is None:
        return
    maps = [Path(entry["seg_map_path"]) for entry in entries]
    if not getattr(dataset, "ann_file", ""):
        _check_orphans(source, dataset, maps)
    facts = check_label_maps(source, loader.get("imdecode_backend") or _backend(cfg, loader), maps, pictures)
    reduced = loader.get("reduce_zero_label")
    reduced = getattr(dataset, "reduce_zero_label", False) if reduced is None else reduced
    check_values(cfg, source, maps, facts, bool(reduced), getattr(dataset, "label_map", None))


def check_label_maps(
    source: Source, backend: str, maps: Sequence[Path], pictures: Sequence[PictureFacts | None]
) -> list[MapFacts]:
    """Read every label map as the pipeline will, and compare it with its picture.

    Args:
        source: the data set.
        backend: what the pipeline decodes maps with, or `COLOURS`.
        maps: the files.
        pictures: the facts about the picture of each map; None if they are not known.

    Returns:
        The facts about each map.

    Raises:
        InputError: a map is missing, damaged, of another size than its picture or turned another way.
    """
    facts = look(f"label maps: {backend}", partial(read_map, backend), MapFacts, maps)
    missing = [path for path, fact in zip(maps, facts) if fact is None]
    if missing:
        raise InputError(
            f"the {source.split} label map {missing[0]} does not exist, and its picture does{and_more(len(missing))}; "
            f"{near(missing[0])}"
        )
    bad = [(path, fact.fault) for path, fact in zip(maps, facts) if fact.fault]
    if bad:
        raise InputError(f"the {source.split} label map {bad[0][0]}{and_more(len(bad))} {bad[0][1]}")
    for path, fact, picture in zip(maps, facts, pictures):
        if picture is not None:
            _check_pair(source, path, fact, picture)
    return facts


def check_values(
    cfg: Config, source: Source, maps: Sequence[Path], facts: Sequence[MapFacts], reduced: bool, renamed: Mapping | None
) -> None:
    """Make sure that label maps hold classes of the config, and warn where there is only one.

    Args:
        cfg: the config.
        source: the data set.
        maps: its label maps.
        facts: the facts about each label map.
        reduced: whether 0 means to ignore, and every class counts one less.
        renamed: from old to new class numbers, applied after `reduced`; None for no change.

    Raises:
        InputError: a map has a class beyond the config's, or all pixels are ignored.
    """
    classes = source.classes()
    if not classes:
        return
    ignored = _ignored(cfg, source)
    found: dict[int, int] = {}  # the value in the file for each class
    for path, fact in zip(maps, facts):
        for value in fact.values:
            label = (_IGNORED if value in (0, _IGNORED) else value - 1) if reduced else value
            label = (renamed or {}).get(label, label)
            if label in ignored:
                continue
            if not 0 <= label < len(classes):
                how = f" (value {value}, less 1 by reduce_zero_label)" if reduced else ""
                where = f"{source.split}_evaluator" if source.evaluated else "model.decode_head"
                raise InputError(
                    f"the {source.split} label map {path} has class {label}{how}, but the config has {len(classes)} "
                    f"classes, 0 to {len(classes) - 1}; correct the map, or {source.key}.metainfo.classes, or set "
                    f"{where}.ignore_index if the class is not to count"
                )
            found[label] = value
    folder = maps[0].parent
    if not found:
        raise InputError(f"the {source.split} label maps in {folder} hold nothing but pixels that are ignored")
    if len(found) == 1 and len(classes) > 1:
        label, value = next(iter(found.items()))
        rest = sorted({value for fact in facts for value in fact.values} - {value})
        listed = ", ".join(map(str, rest[:_VALUES_SAID])) + (", ..." if len(rest) > _VALUES_SAID else "")
        others = f" and {listed}, which {'is' if len(rest) == 1 else 'are'} ignored" if rest else ""
        click.echo(
            f"warning: the {source.split} label maps in {folder} hold nothing but class {label} ({classes[label]}"
            f"{others}); write the classes as 0 to {len(classes) - 1}",
            err=True,
        )


def read_map(backend: str, path: Path) -> MapFacts:
    """The facts about a label map, read as a pipeline reads it with a backend of mmcv; without values for `COLOURS`."""
    picture = read_ends(path)
    if picture.fault:
        return MapFacts(0, 0, 1, [], f"{picture.fault}; replace it")
    if backend == COLOURS:
        return MapFacts(picture.width, picture.height, picture.orientation, [], "")
    try:
        if backend == "pillow":
            with Image.open(path) as image:
                fault, values = _pillow_values(image)
        else:
            import mmcv

            fault, values = _array_values(
                mmcv.imfrombytes(path.read_bytes(), flag="unchanged", backend=backend), f"{backend} reads it as"
            )
    except MemoryError:
        raise
    except Exception as error:  # decoders fail in every way on damaged files
        return MapFacts(0, 0, 1, [], f"is damaged or cut short: {first_line(error)}; replace it")
    return MapFacts(picture.width, picture.height, picture.orientation, values, fault)


def _pillow_values(image: Image.Image) -> tuple[str, list[int]]:
    """What is wrong with a map, and its values; for a palette picture these are the indices, as NumPy sees them."""
    if image.mode in ("L", "P"):
        return "", [value for value, count in enumerate(image.histogram()) if count]
    return _array_values(np.asarray(image), f"it has Pillow's mode {image.mode},")


def _array_values(array: np.ndarray, how: str) -> tuple[str, list[int]]:
    array = array.squeeze()
    if array.ndim != 2:
        channels = array.shape[-1] if array.ndim else 1
        return (
            f"is not a map of class numbers: {how} {channels} channels; save class numbers as a picture of one channel "
            "of 8 bits",
            [],
        )
    values = np.unique(array)
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.round(values)).all()):
        return f"is not a map of class numbers: {how} fractions; save class numbers as 8 bits", []
    whole = [int(value) for value in values]
    return "", whole if len(whole) <= _VALUES_KEPT else [*whole[:_VALUES_KEPT], whole[-1]]


def _check_pair(source: Source, path: Path, fact: MapFacts, picture: PictureFacts) -> None:
    """Refuse a map with another size or orientation than its picture: each is turned by its own EXIF tag."""
    what = f"the {source.split} label map {path}"
    if fact.orientation != picture.orientation:
        turned = f"by EXIF orientation {picture.orientation if picture.orientation != 1 else fact.orientation}"
        if fact.orientation == 1:
            said = f"is not turned, but its picture is, {turned}"
        elif picture.orientation == 1:
            said = f"is turned {turned}, but its picture is not"
        else:
            said = f"is turned by EXIF orientation {fact.orientation}, but its picture {turned}"
        raise InputError(f"{what} {said}; save both upright, without the orientation")
    if (fact.width, fact.height) != picture.stored:
        raise InputError(
            f"{what} has {fact.width}x{fact.height} pixels, but its picture has {picture.width}x{picture.height}; "
            "make the sizes equal"
        )


def _build(source: Source) -> Any:
    """The data set without its pipeline, so that it lists the files that it will read."""
    try:
        return source.built(pipeline=[], serialize_data=False, lazy_init=False)
    except Exception as error:  # classes of data sets, users' own among them, fail in every way
        raise InputError(
            f"the {source.split} data cannot be listed by {source.kind.__name__}: {first_line(error)}; see {source.key}"
        ) from error


def _refuse_empty(source: Source, dataset: Any) -> None:
    folder = Path(dataset.data_prefix.get("img_path") or "")
    suffix = getattr(dataset, "img_suffix", "")
    if getattr(dataset, "ann_file", ""):
        raise InputError(f"the config's {source.split} data is empty: {dataset.ann_file} names no picture")
    others = sorted({path.suffix for path in folder.rglob("*") if path.is_file() and not path.name.endswith(suffix)})
    raise InputError(
        f"the config's {source.split} data is empty: no file in {folder} ends in {suffix!r}, the data set's img_suffix"
        + (f"; there are files that end in {', '.join(others[:4])}: set {source.key}.img_suffix" if others else "")
    )


def _check_orphans(source: Source, dataset: Any, maps: Sequence[Path]) -> None:
    """Refuse maps if the name of their picture is not read, and warn about maps without any picture.

    Maps of pictures that the data set leaves out by its `indices` are no orphans.
    """
    folder, suffix = Path(dataset.data_prefix["seg_map_path"]), dataset.seg_map_suffix
    known = set(maps)
    pictures = Path(dataset.data_prefix.get("img_path") or "")
    unread = sorted(path for path in folder.rglob("*") if path.name.endswith(suffix) and path not in known)
    names = (path.relative_to(folder).as_posix().removesuffix(suffix) + dataset.img_suffix for path in unread)
    orphans = {path: pictures / name for path, name in zip(unread, names) if not (pictures / name).exists()}
    if not orphans:
        return
    for orphan, wanted in orphans.items():
        alike = [path for path in wanted.parent.glob("*") if path.stem.lower() == wanted.stem.lower()]
        if alike:
            raise InputError(
                f"the {source.split} label map {orphan} has a picture that is not read, {alike[0]}: its name does not "
                f"end in {dataset.img_suffix!r}, as {source.key}.img_suffix says; rename it to {wanted.name}"
            )
    first = next(iter(orphans))
    click.echo(
        f"warning: the {source.split} label map {first} has no picture{and_more(len(orphans))} and is not read",
        err=True,
    )


def _backend(cfg: Config, loader: Mapping) -> str:
    """What a loader of label maps decodes with by default: Pillow in mmseg, OpenCV in mmdet."""
    kind = registered_class(TRANSFORMS, loader, cfg)
    return "cv2" if kind is not None and kind.__module__.startswith("mmdet.") else "pillow"


def _ignored(cfg: Config, source: Source) -> set[int]:
    """The class numbers that do not count: for every head in training, for every metric in evaluation."""
    if source.evaluated:
        counted = [settings for _, settings in evaluators(cfg, source.split)]
    else:
        model = cfg.get("model") or {}
        heads = [model.get(key) or [] for key in ("decode_head", "auxiliary_head")]
        counted = [part for head in heads for part in (head if isinstance(head, (list, tuple)) else [head])]
    ignored = [{settings.get("ignore_index", _IGNORED)} for settings in counted]
    return set.intersection(*ignored) if ignored else {_IGNORED}
