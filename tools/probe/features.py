"""Maps of a frozen model, computed once and kept in half precision, in memory or, if they are many, on disk."""

import shutil
import tempfile
from collections.abc import Callable, Iterable

import torch
from torch import nn

from terrazzo.errors import InputError
from terrazzo.tools.inspect.maps import last_map

IN_MEMORY = 2 << 30
"""Bytes of maps that are kept in memory; more go into a file of the folder for temporary files."""


class Maps:
    """Maps (C, h, w) of pictures, each written once, in float16.

    Args:
        count: number of pictures.
        shape: of a map.
        in_memory: bytes that may be kept in memory; a larger store is a file that vanishes with it.

    Raises:
        InputError: the disk has too little room.
    """

    def __init__(self, count: int, shape: torch.Size, in_memory: int = IN_MEMORY):
        size = (count, *shape)
        need = 2 * torch.Size(size).numel()
        self.file = None
        if need <= in_memory:
            self.kept = torch.empty(size, dtype=torch.float16)
            return
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if need > 0.9 * free:
            raise InputError(
                f"the maps of {count} pictures need {need / 2**30:.1f} GiB, and {folder} has {free / 2**30:.1f} GiB "
                "left: take a smaller --size, or set TMPDIR to a folder on a larger disk"
            )
        self.file = tempfile.NamedTemporaryFile(prefix="terrazzo-maps-")  # noqa: SIM115, it lives as long as the maps
        self.file.truncate(need)
        flat = torch.from_file(self.file.name, shared=True, size=need // 2, dtype=torch.float16)
        self.kept = flat.view(size)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int | torch.Tensor) -> torch.Tensor:
        """Maps in float32."""
        return self.kept[index].float()

    def write(self, index: int, found: torch.Tensor) -> None:
        """Keep the map (C, h, w) of a picture. InputError if half precision cannot hold it."""
        self.kept[index] = found.half()
        if not self.kept[index].isfinite().all():
            raise InputError(
                "a map has values that are not finite in half precision, so no probe can be trained on it; "
                "check the weights (--checkpoint)"
            )


def maps_of(
    model: nn.Module, images: Iterable[torch.Tensor], count: int, device: torch.device, done: Callable[[], None]
) -> Maps:
    """The last map of every image (1, 3, H, W).

    Args:
        model: frozen, on `device`.
        images: prepared pictures.
        count: number of images.
        done: called after each image.
    """
    kept = None
    for index, image in enumerate(images):
        found = last_map(model, image.to(device))[0].cpu()
        kept = kept or Maps(count, found.shape)
        kept.write(index, found)
        done()
    return kept
