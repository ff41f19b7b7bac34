"""Restorers in lower precision: degraded pictures to try them on, and how far their pictures are from float32's."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx
from torch import Tensor

from terrazzo.degradations.quality import MOST_PSNR
from terrazzo.errors import InputError
from terrazzo.tools.data.pictures import Picture
from terrazzo.tools.export.precision.sensitivity import values
from terrazzo.tools.export.targets import Exportable
from terrazzo.tools.predict.restorers import Degrader, reflected

ERROR = 1e-2
"""The largest `sensitivity.output_error` of a restorer that passes if no data set decides. For a picture, whose rms is
about half of white, it is 46 dB."""

_HELD_OUT = 4  # every fourth picture is compared on, and the others set ranges
_MOST_HELD_OUT = 8


def degraded_inputs(ready: Exportable, pictures: Iterable[Picture]) -> list[tuple[Tensor, ...]]:
    """The middles of pictures at the file's size, (1, 3, H, W) in 0..255, made worse as the restorer expects it.

    A smaller picture is reflected. A network that does not say what it restores from takes pictures as they are.
    """
    settings, found = ready.preparation["degradation"], []
    degrade = None if settings is None else Degrader(settings)
    for picture in pictures:
        image = picture.read()
        if degrade is not None:
            image = degrade(image, picture.name).image
        height, width = (min(side, own) for side, own in zip(ready.size, (image.height, image.width)))
        left, top = (image.width - width) // 2, (image.height - height) // 2
        middle = image.crop((left, top, left + width, top + height))
        found.append((255 * reflected(middle, ready.size)[None],))
    return found


def held_out(samples: Sequence[tuple[Tensor, ...]]) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
    """Samples that set ranges, and samples to compare restored pictures on.

    Raises:
        InputError: there is only one.
    """
    if len(samples) < 2:
        raise InputError(
            "a restorer needs two pictures or more: some set the ranges, and the others show what lower precision costs"
        )
    rest = samples[::_HELD_OUT][:_MOST_HELD_OUT]
    return [sample for index, sample in enumerate(samples) if index % _HELD_OUT], list(rest)


def psnr_to(plain: onnx.ModelProto, samples: Sequence[tuple[Tensor, ...]]) -> Callable[[onnx.ModelProto], float]:
    """A function that gives the mean PSNR, in dB, of another graph's RGB against those of this graph, not rounded.

    The PSNR of equal pictures counts as 100 dB.
    """
    expected = _restored(plain, samples)

    def psnr(lowered: onnx.ModelProto) -> float:
        errors = (np.mean(np.square(mine - other)) for mine, other in zip(expected, _restored(lowered, samples)))
        return float(np.mean([_psnr(error) for error in errors]))

    return psnr


def _psnr(error: float) -> float:
    return min(10 * np.log10(255**2 / error), MOST_PSNR) if error > 0 else MOST_PSNR


def _restored(model: onnx.ModelProto, samples: Sequence[tuple[Tensor, ...]]) -> list[np.ndarray]:
    name = model.graph.output[0].name
    return [values(model, [name], sample)[name].astype(np.float64) for sample in samples]
