"""Whether the pictures of a data set are there, whole, of the size that their annotations say, and upright."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from terrazzo._pictures import orientation, read_picture, upright_size
from terrazzo.errors import InputError, first_line
from terrazzo.tools.data.checks.remembered import look
from terrazzo.tools.data.checks.source import Source, and_more, near

# Data sets up to these numbers of files and bytes are decoded in full, which takes seconds. For larger data sets, only
# the header and the end of each file are read.
_DECODED_FILES, _DECODED_BYTES = 4000, 512 << 20
# An encoder's end mark lies this near to the end of the file, unless a camera has appended something.
_TAIL_BYTES = 64 << 10
# The end mark of a format, by the two bytes that its files start with.
_END_MARKS = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}
_QUARTER_TURNS = (5, 6, 7, 8)


class PictureFacts(NamedTuple):
    """What is known about a picture: its stored size, EXIF's orientation (1 is upright), and what is wrong."""

    width: int
    height: int
    orientation: int
    fault: str

    @property
    def stored(self) -> tuple[int, int]:
        """Width and height in the file."""
        return self.width, self.height

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height as a pipeline sees them."""
        return self.stored[::-1] if self.orientation in _QUARTER_TURNS else self.stored


@dataclass(frozen=True)
class Sample:
    """A picture as a data set names it.

    Attributes:
        path: the file.
        entry: the entry that names it, for messages; empty if the folder does.
        size: width and height by the annotations; None if they do not say.
        labelled: whether boxes or masks use its coordinates.
    """

    path: Path
    entry: str = ""
    size: tuple[float, float] | None = None
    labelled: bool = False


def check_pictures(source: Source, samples: Sequence[Sample]) -> list[PictureFacts]:
    """Make sure that pictures can be read and match the annotations.

    Args:
        source: the data set.
        samples: its pictures.

    Returns:
        The facts about each.

    Raises:
        InputError: a picture is missing, damaged, of another size or turned.
    """
    paths = [sample.path for sample in samples]
    if _is_small(paths):
        facts = look("pictures", read_whole, PictureFacts, paths)
    else:
        facts = look("pictures: headers", read_ends, PictureFacts, paths)
    missing = [sample for sample, fact in zip(samples, facts) if fact is None]
    if missing:
        first = missing[0]
        by = f", which {first.entry} names," if first.entry else ""
        raise InputError(
            f"the {source.split} picture {first.path}{by} does not exist{and_more(len(missing))}; {near(first.path)}"
        )
    bad = [(sample, fact) for sample, fact in zip(samples, facts) if fact.fault]
    if bad:
        sample, fact = bad[0]
        raise InputError(
            f"the {source.split} picture {sample.path}{and_more(len(bad))} {fact.fault}; replace it, or take it out of "
            f"{source.key}"
        )
    upright = _reads_upright(source)
    for sample, fact in zip(samples, facts):
        if sample.size is not None:
            _check_size(source, sample, fact if upright else fact._replace(orientation=1))
    return facts


def read_ends(path: Path) -> PictureFacts:
    """The facts about a picture by its header and its last bytes; it is decoded only if these leave doubt."""
    return _examine(path, whole=False)


def read_whole(path: Path) -> PictureFacts:
    """The facts about a picture by decoding it."""
    return _examine(path, whole=True)


def _examine(path: Path, whole: bool) -> PictureFacts:
    try:
        turn, size = orientation(path), upright_size(path)
        if whole:
            read_picture(path)
        elif not _ends_well(path):
            with Image.open(path) as image:
                image.load()
    except MemoryError:
        raise
    except InputError as error:
        return PictureFacts(0, 0, 1, str(error).removeprefix(f"picture {path} "))
    except Exception as error:  # decoders fail in every way on damaged files
        return PictureFacts(0, 0, 1, f"is damaged or cut short: {first_line(error)}")
    return PictureFacts(*(size[::-1] if turn in _QUARTER_TURNS else size), turn, "")


def _ends_well(path: Path) -> bool:
    """Whether a JPEG or PNG has its end mark near its end; a file that was cut short has not."""
    with path.open("rb") as file:
        mark = _END_MARKS.get(file.read(2), b"")
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        return mark in file.read()


def _is_small(paths: Sequence[Path]) -> bool:
    if len(paths) > _DECODED_FILES:
        return False
    total = 0
    for path in paths:
        try:
            total += path.stat().st_size
        except (OSError, ValueError):
            continue
    return total <= _DECODED_BYTES


def _reads_upright(source: Source) -> bool:
    """Whether the pipeline turns pictures as EXIF says, which it does unless a flag forbids it."""
    return not str((source.step("LoadImageFromFile") or {}).get("color_type")).endswith("_ignore_orientation")


def _check_size(source: Source, sample: Sample, fact: PictureFacts) -> None:
    what = f"the {source.split} picture {sample.path}"
    said = f"{sample.entry} says {_by(sample.size)}"
    upright = "save the picture upright, without EXIF's orientation, and annotate that"
    if sample.size != fact.upright:
        if sample.size == fact.stored:
            raise InputError(
                f"{what} is turned by its EXIF orientation {fact.orientation}: it is read upright as "
                f"{_by(fact.upright)}, but {said}, as it is stored; {upright}"
            )
        raise InputError(f"{what} has {_by(fact.upright)} pixels, but {said}; correct width and height, or the picture")
    if sample.labelled and fact.orientation != 1 and fact.upright == fact.stored:
        raise InputError(
            f"{what} is turned by its EXIF orientation {fact.orientation}, and its size does not show whether the "
            f"annotations are, too; {upright}"
        )


def _by(size: tuple[float, float]) -> str:
    return "x".join(f"{side:g}" for side in size)
