"""Finding and reading pictures: all are read before anything is computed, so that a bad one stops the command early."""

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from terrazzo._pictures import SUFFIXES, is_hidden, is_picture, read_picture
from terrazzo.errors import InputError
from terrazzo.tools.data.windows import Windows, open_windows


@dataclass(frozen=True)
class Picture:
    """A picture on disk that is known to be readable.

    Attributes:
        path: the file.
        name: what its results are called; no two pictures of one command share it.
    """

    path: Path
    name: str

    def read(self) -> Image.Image:
        """The picture in RGB and upright; InputError if it cannot be read. See `read_picture`."""
        return read_picture(self.path)

    def windows(self) -> Windows:
        """The picture opened to be read by windows; InputError if it cannot be read. See `open_windows`."""
        return open_windows(self.path)


@dataclass(frozen=True)
class FetchedPicture(Picture):
    """A picture from a server.

    Attributes:
        path: its address.
        data: the bytes of its file.
    """

    path: str
    data: bytes

    def read(self) -> Image.Image:
        """The picture in RGB and upright; InputError if it cannot be read."""
        return read_picture(io.BytesIO(self.data), self.path)

    def windows(self) -> Windows:
        """The picture opened to be read by windows; InputError if it cannot be read."""
        return open_windows(io.BytesIO(self.data), self.path)


def find_pictures(places: Iterable[str | Path]) -> list[Picture]:
    """Collect pictures from files and folders (not their subfolders) and make sure that each can be read.

    Args:
        places: files, and folders to take every picture of, without hidden files.

    Raises:
        InputError: a place does not exist, a folder has no pictures, or a picture cannot be read.
    """
    paths: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            shown = (path for path in place.iterdir() if not is_hidden(path, place))
            inside = sorted(path for path in shown if is_picture(path) and path.is_file())
            if not inside:
                raise InputError(f"folder {place} has no pictures; the suffixes read are {', '.join(SUFFIXES)}")
            paths += inside
        else:
            paths.append(place)
    names = unique_names([(path.stem, path.suffix) for path in paths])
    pictures = [Picture(path, name) for path, name in zip(paths, names)]
    for picture in pictures:
        picture.read()
    return pictures


def unique_names(stems: Sequence[tuple[str, str]]) -> list[str]:
    """Each (stem, suffix) as a name: the stem, with the suffix or a number added where two would be the same."""
    names: dict[str, None] = {}
    counts = Counter(stem for stem, _ in stems)
    for stem, suffix in stems:
        name = stem if counts[stem] == 1 else f"{stem}{suffix}".replace(".", "_")
        number = 1
        while name in names:
            number += 1
            name = f"{stem}_{number}"
        names[name] = None
    return list(names)


def to_tensor(
    image: Image.Image, size: tuple[int, int], mean: Sequence[float], std: Sequence[float], crop: bool = False
) -> torch.Tensor:
    """The picture as a model's input (1, 3, H, W), normalised.

    Args:
        image: in RGB.
        size: (H, W).
        mean, std: of the three colours, for values from 0 to 1.
        crop: cut the middle of the picture in the shape of `size`; otherwise the whole picture is stretched.
    """
    width_height = size[::-1]
    if crop:
        image = ImageOps.fit(image, width_height, Image.Resampling.BICUBIC)
    else:
        image = image.resize(width_height, Image.Resampling.BICUBIC)
    colours = torch.from_numpy(np.asarray(image, np.float32) / 255)
    return ((colours - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)[None].contiguous()


def to_bgr(image: Image.Image) -> np.ndarray:
    """The picture (H, W, 3) uint8 with blue first, as OpenMMLab's pipelines expect it."""
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])
