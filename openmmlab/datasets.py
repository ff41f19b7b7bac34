"""Folders of images, one folder per class or without labels, with timm's transforms."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS
from PIL import Image
from timm.data import auto_augment, create_transform
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from terrazzo._pictures import is_hidden, is_picture, pictures_inside, read_picture, spread
from terrazzo.errors import InputError
from terrazzo.openmmlab.adaptive_rotation import AdaptiveRotation


class _Folders(ImageFolder):
    """torchvision's, without hidden folders such as `.ipynb_checkpoints`."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = sorted(path.name for path in Path(directory).iterdir() if path.is_dir() and path.name[0] != ".")
        if not names:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return names, {name: index for index, name in enumerate(names)}


@DATASETS.register_module()
class ImageFolderDataset(Dataset):
    """Images under `data_root/split/CLASS/`.

    Args:
        data_root: the folder of the data set.
        split: the folder in it, such as "train".
        transform: arguments of `timm.data.create_transform`, such as `dict(input_size=64, is_training=True)`.
        metainfo: `classes`, the names that the folders must have; their order is alphabetical, as in torchvision.

    Attributes:
        metainfo: `classes`, the names of the classes in the order of their indices.

    Raises:
        InputError: if the folder is missing or empty, or its classes are not the named classes.
    """

    def __init__(self, data_root: str, split: str, transform: dict, metainfo: dict | None = None):
        folder = Path(data_root) / split
        if not folder.is_dir():
            raise InputError(f"data folder '{folder}' does not exist; unpack the data there or set data_root")
        try:
            self.images = _Folders(
                str(folder),
                _transform(transform),
                loader=read_picture,
                is_valid_file=lambda path: is_picture(path) and not is_hidden(path, folder),
            )
        except FileNotFoundError as error:
            raise InputError(f"data folder '{folder}' does not have one folder of images per class: {error}") from error
        wanted: Sequence[str] = (metainfo or {}).get("classes") or self.images.classes
        if list(wanted) != self.images.classes:
            raise InputError(
                f"data folder '{folder}' has classes {', '.join(self.images.classes)}, but the config says "
                f"{', '.join(wanted)}; make metainfo.classes and num_classes agree with the folders"
            )
        self.metainfo = {"classes": tuple(wanted)}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        """The image as `inputs`, 3 H W and normalised, its class index as `targets`, and its file as `img_path`."""
        image, target = self.images[index]
        return {"inputs": image, "targets": target, "img_path": self.images.samples[index][0]}


@DATASETS.register_module()
class RotatedImages(Dataset):
    """Images without labels, anywhere under `data_root/split`, each with a window rotated, for RoMA's pretraining.

    Args:
        data_root: the folder of the data set.
        split: a folder in it, or "" for the whole folder.
        transform: as in `ImageFolderDataset`.
        rotation: arguments of `AdaptiveRotation`.

    Raises:
        InputError: if the folder is missing or holds no images, or `rotation` does not fit.
    """

    metainfo: dict = {}

    def __init__(self, data_root: str, split: str, transform: dict, rotation: dict | None = None):
        self.files = pictures_inside(Path(data_root) / split)
        self.transform = _transform(transform)
        self.rotate = AdaptiveRotation(**{key: value for key, value in (rotation or {}).items() if key != "_scope_"})

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        """The rotated image as `inputs`, the image as `targets`, the `window` of `AdaptiveRotation`, `img_path`."""
        image = self.transform(read_picture(self.files[index]))
        rotated, window = self.rotate(image)
        return {"inputs": rotated, "targets": image, "window": window, "img_path": str(self.files[index])}


@DATASETS.register_module()
class Pictures(Dataset):
    """Images without labels, anywhere under one or several folders.

    Args:
        data_root: the folder that holds the others.
        folders: folders in it, or absolute paths; "" for the whole folder.
        transform: as in `ImageFolderDataset`.
        most: at most this many images of each folder, evenly spaced in the order of their names; None for all. It keeps
            a folder of many small images from outweighing the others.

    Attributes:
        files: the images.

    Raises:
        InputError: if a folder is missing or holds no images.
    """

    metainfo: dict = {}

    def __init__(self, data_root: str, transform: dict, folders: str | Sequence[str] = "", most: int | None = None):
        if most is not None and (type(most) is not int or most < 1):
            raise InputError(f"most must be a number of images from 1, or None for all, got {most!r}")
        self.files: list[Path] = []
        for name in [folders] if isinstance(folders, str) else folders:
            found = pictures_inside(Path(data_root) / name)
            self.files += found if most is None else spread(found, most)
        if not self.files:
            raise InputError("folders is empty; name folders with images, or leave it out for all of data_root")
        self.transform = _transform(transform)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        """The image as `inputs`, 3 H W and normalised, and its file as `img_path`."""
        return {"inputs": self.transform(read_picture(self.files[index])), "img_path": str(self.files[index])}


def _transform(arguments: dict) -> Callable:
    """timm's transform with these arguments, without mmengine's scope key."""
    transform = create_transform(**{key: value for key, value in arguments.items() if key != "_scope_"})
    for step in transform.transforms:
        for operation in [*getattr(step, "ops", ()), *itertools.chain(*getattr(step, "policy", ()))]:
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """timm's posterize, but black at 0 bits: RandAugment draws 0 at high levels, and recent Pillow refuses it."""
    return auto_augment.posterize(image, bits, **kwargs) if bits > 0 else Image.new(image.mode, image.size)
