"""Whether folders of pictures, one per class or without labels, hold pictures that can be read."""

from pathlib import Path
from typing import Any

from terrazzo.errors import InputError
from terrazzo.openmmlab.datasets import ImageFolderDataset
from terrazzo.tools.data.checks.pictures import Sample, check_pictures
from terrazzo.tools.data.checks.source import Source


def check_folders(source: Source) -> None:
    """Check the classes of a data set of folders, and its pictures.

    Raises:
        InputError: the folders are not the config's classes, one has no picture, or a picture is damaged.
    """
    dataset = built(source)  # it compares its folders with the config itself
    if isinstance(dataset, ImageFolderDataset):
        paths = [path for path, _ in dataset.images.samples]
    else:
        paths = dataset.files
    check_pictures(source, [Sample(Path(path)) for path in paths])


def built(source: Source) -> Any:
    """The data set of the settings.

    Raises:
        InputError: it cannot be built; the message names the data set in the config.
    """
    try:
        return source.kind(**{key: value for key, value in source.settings.items() if key not in ("type", "_scope_")})
    except InputError as error:
        raise InputError(f"{error} (the {source.split} data, {source.key})") from error
