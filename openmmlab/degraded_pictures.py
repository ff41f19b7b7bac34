"""Pictures and degraded copies of them, made on the fly, for restoration."""

from pathlib import Path

import torch
from mmengine.registry import DATASETS
from torch import Tensor
from torch.utils.data import Dataset

from terrazzo._pictures import pictures_inside, read_picture
from terrazzo.degradations import degradation_of
from terrazzo.degradations.pixels import generator_of, in_multiples, to_pixels
from terrazzo.errors import InputError


@DATASETS.register_module()
class DegradedPictures(Dataset):
    """Clean pictures anywhere under `data_root/split`, each with a degraded copy; hidden files are left out.

    In training, the crop, its flips and turns and the degradation are drawn from PyTorch's generator, which
    `SeededDataset` seeds by the place in the run: the numbers depend on the run's seed, the epoch and the place, and
    not on worker processes. Otherwise they depend only on the picture's path in the folder, so that all tests see the
    same.

    Args:
        data_root: the folder of the data set.
        split: a folder in it, such as "images/train", or "" for the whole folder.
        degradation: `type`, one of `terrazzo.degradations.KINDS`, and its arguments.
        crop: side in pixels of the clean crop, a multiple of the degradation's scale: a random crop in training, the
            middle otherwise; None for whole pictures.
        training: whether to draw crops, flips, right-angle turns and degradations anew each time.

    Attributes:
        files: the pictures.
        degradation: what makes them worse.

    Raises:
        InputError: the folder is missing or holds no pictures, or an argument has no meaning.
    """

    metainfo: dict = {}

    def __init__(self, data_root: str, split: str, degradation: dict, crop: int | None = None, training: bool = False):
        self.folder = Path(data_root) / split
        self.files = pictures_inside(self.folder)
        self.degradation = degradation_of(degradation)
        if crop is not None and (type(crop) is not int or crop < 1 or crop % self.degradation.scale):
            raise InputError(
                f"the crop is {crop!r}; it must be a number of pixels, and a multiple of the degradation's scale, "
                f"{self.degradation.scale}"
            )
        if training and crop is None:
            raise InputError("training needs pictures of one size: set crop")
        self.crop, self.training = crop, training

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        """The degraded picture as `inputs`, the clean picture as `targets`, in 0..1, and its file as `img_path`.

        Raises:
            InputError: the picture cannot be read, or is smaller than the crop or than the scale.
        """
        file = self.files[index]
        if self.training:
            generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        else:
            generator = generator_of(file.relative_to(self.folder).as_posix())
        clean = in_multiples(to_pixels(read_picture(file)), self.degradation.scale)
        height, width = clean.shape[-2:]
        if min(height, width) < (self.crop or 1):
            raise InputError(
                f"picture {file} has {width}x{height} pixels in multiples of the scale {self.degradation.scale}, and "
                f"the crop {self.crop}; take it out or make the crop smaller"
            )
        inputs, targets = self._pair(clean, generator)
        if self.training:
            turns, flip = (int(torch.randint(most, (), generator=generator)) for most in (4, 2))
            inputs, targets = (_turned(x, turns, bool(flip)) for x in (inputs, targets))
        return {"inputs": inputs, "targets": targets, "img_path": str(file)}

    def _pair(self, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A degraded and a clean crop: as if the whole picture had been degraded first."""
        if self.crop is None:
            return self.degradation(clean, generator), clean
        scale, reach = self.degradation.scale, self.degradation.reach
        seen, own = [], []
        for side in clean.shape[-2:]:
            most = (side - self.crop) // scale
            place = int(torch.randint(most + 1, (), generator=generator)) if self.training else most // 2
            start, end = place * scale, place * scale + self.crop
            first, last = (0, side) if reach is None else (max(start - reach, 0), min(end + reach, side))
            seen.append(slice(first, last))
            own.append(slice((start - first) // scale, (end - first) // scale))
        degraded = self.degradation(clean[:, seen[0], seen[1]], generator)[:, own[0], own[1]]
        inside = [slice(part.start * scale, part.stop * scale) for part in own]
        return degraded.contiguous(), clean[:, seen[0], seen[1]][:, inside[0], inside[1]].contiguous()


def _turned(x: Tensor, turns: int, flip: bool) -> Tensor:
    """A square (3, n, n) after right-angle turns, and perhaps a flip."""
    return torch.rot90(x.flip(-1) if flip else x, turns, (-2, -1)).contiguous()
