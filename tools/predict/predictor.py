"""`terrazzo.Predictor`: `terrazzo infer` in Python."""

import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from terrazzo._pictures import to_rgb
from terrazzo.errors import InputError
from terrazzo.tools.data.pictures import Picture
from terrazzo.tools.data.windows import WholePicture, Windows
from terrazzo.tools.mechanisms import Mechanism, refuse_changes
from terrazzo.tools.predict.classifiers import Engine, timm_predictor
from terrazzo.tools.predict.prediction import Prediction
from terrazzo.tools.predict.restorers import Degraded, Degrader, RestorePredictor
from terrazzo.tools.predict.tiles.engine import TileEngine, check_tiles, predicted, tile_engine
from terrazzo.tools.targets import is_config, load_timm_model, pick_device

if TYPE_CHECKING:
    from mmengine.config import Config

RUNTIMES = ("torch", "onnx", "openvino", "pt2", "aoti")


class Seen(NamedTuple):
    """A picture with the facts that its record begins with, such as `picture`, its path."""

    image: Image.Image
    facts: dict[str, Any]


class Predictor:
    """Runs a classifier, segmentor, detector or restorer on pictures, and gives the records of `terrazzo infer`.

        predictor = terrazzo.Predictor("fpn_dinat-mini_floors", "work_dirs/floors/iter_40.pth")
        prediction = predictor("floor.png")
        prediction.record["shares"], prediction.labels, prediction.drawing

    Args:
        model: a timm model name, or a timm model, which stays in evaluation mode; an OpenMMLab config by path or
            packaged name, or what `terrazzo.openmmlab.config.load_config` gave; a file that `terrazzo export` wrote,
            with its `runtime`.
        checkpoint: a file of weights; a config needs one.
        device: such as "cpu" or "cuda:1"; None for a GPU if there is one.
        min_score: detections below this score are left out.
        pretrained: whether to download the published weights of a timm model.
        num_classes: classes of a timm model's checkpoint; None for the model's own number.
        runtime: "torch", or the format of an exported file: "onnx", "openvino", "pt2" or "aoti".
        changes: mechanisms of `terrazzo.tools.mechanisms` that change a timm model.
        tile: side in pixels of the tiles into which pictures are cut, at their own resolution (docs/inference.md); None
            for whole pictures, prepared as the config says.
        overlap: how tiles of a picture overlap: a number of pixels, with a hard seam; "blend"; or "auto", for the
            result of the whole picture. None is "auto" for a segmentor, "blend" for a segmentor's exported file and a
            restorer, and a quarter of a tile for a detector.
        degrade: whether to make pictures worse first, as a restorer's config makes its test data (or by bicubic
            reduction, for a network that enlarges), and compare the restored pictures with them. The random numbers
            depend on the file's name without its folder, and degraded pictures are cut to 8 bits, so `terrazzo test`
            gives other figures.

    Raises:
        InputError: a name, file or device that cannot be used, or arguments that do not go together.
    """

    def __init__(
        self,
        model: "str | Path | nn.Module | Config",
        checkpoint: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        min_score: float = 0.3,
        pretrained: bool = False,
        num_classes: int | None = None,
        runtime: str = "torch",
        changes: Sequence[Mechanism] = (),
        tile: int | None = None,
        overlap: int | str | None = None,
        degrade: bool = False,
    ):
        if runtime not in RUNTIMES:
            raise InputError(f"runtime is {runtime!r}; choose one of {', '.join(RUNTIMES)}")
        if not 0 <= min_score <= 1:
            raise InputError(f"min_score is {min_score}; it must be from 0 to 1")
        check_tiles(tile, overlap)
        timm_only = bool(pretrained or num_classes is not None)
        if runtime != "torch" and (checkpoint or timm_only or changes or device):
            raise InputError("an exported file holds its weights and runs on the CPU: leave the other options out")
        where = pick_device(None if device is None else str(device))
        if runtime != "torch":
            self.engine = _of_file(runtime, model, min_score)
        elif isinstance(model, nn.Module):
            if checkpoint or timm_only or changes:
                raise InputError("a model in memory has its weights and classes: leave the other options out")
            self.engine = _of_network(model, where)
        elif isinstance(model, (str, Path)) and not is_config(str(model)):
            self.random = checkpoint is None and not pretrained
            if self.random:
                message = f"{model} has random weights; give weights with checkpoint=FILE or pretrained=True"
                warnings.warn(message, stacklevel=2)
            built = load_timm_model(str(model), checkpoint, pretrained, num_classes, changes=changes)
            self.engine = _of_network(built, where)
        else:
            refuse_changes(str(getattr(model, "filename", model)), changes)
            if timm_only:
                raise InputError(
                    "pretrained weights and a number of classes are for timm models; a config takes only a checkpoint"
                )
            self.engine = _of_config(model, checkpoint, where, min_score, tile is None)
        if degrade:
            self.degrader = Degrader(getattr(self.engine, "degradation", None))
        if tile is not None:
            self.tiles = tile_engine(self.engine, tile, overlap)

    engine: Engine
    """The model, of any kind."""
    tiles: TileEngine | None = None
    """The model on pictures in tiles; None if pictures are not cut."""
    degrader: Degrader | None = None
    """What makes pictures worse; None if they are taken as they are."""
    random = False
    """Whether the weights are random numbers."""

    def __call__(self, pictures: Any, batch: int = 1) -> Any:
        """Predict.

        Args:
            pictures: a path, a picture of Pillow or an array of uint8 (H, W, 3) with red first; or several of these, in
                a list, another iterable or an array (N, H, W, 3).
            batch: how many pictures run together, if they are equally large after their preparation; or how many tiles.

        Returns:
            A `Prediction`, or a list of a `Prediction` for each picture: its `record` is what `terrazzo infer` writes
            as JSON (`picture` is None for a picture without a path), its `drawing` the picture with the result on it;
            a segmentor gives `labels`, class indices (H, W), a panoptic segmentor `segments` (H, W), and a restorer
            `restored`, a picture of Pillow.

        Raises:
            InputError: a picture that cannot be read, or is no picture.
        """
        if _is_single(pictures):
            return next(self.stream([pictures], batch))
        return list(self.stream(pictures, batch))

    def stream(self, pictures: Iterable[Any], batch: int = 1) -> Iterator[Prediction]:
        """Predict one batch after another, so that neither pictures nor results pile up; see `__call__`."""
        if batch < 1:
            raise InputError(f"batch is {batch}; it must be at least 1")
        remaining = iter(pictures)
        if self.tiles is not None:
            for item in remaining:
                yield self._in_tiles(item, batch)
            return
        while taken := [seen_of(item) for item in itertools.islice(remaining, batch)]:
            pairs = [self._degraded(seen) for seen in taken]
            shown = [seen.image if pair is None else pair.image for seen, pair in zip(taken, pairs)]
            for (image, facts), pair, found in zip(taken, pairs, self.engine.predict(shown), strict=True):
                prediction = self._compared(found, pair)
                record = {**facts, "width": image.width, "height": image.height, **prediction.record}
                yield dataclasses.replace(prediction, record=record)

    def _in_tiles(self, item: Any, batch: int) -> Prediction:
        assert self.tiles is not None

        def silent(done: int, total: int) -> None:
            pass

        if self.degrader is None:
            windows, facts = _windows_of(item)
            with windows:
                return predicted(self.tiles, windows, facts, batch, silent)
        seen = seen_of(item)
        pair = self._degraded(seen)
        assert pair is not None
        found = self.tiles.predict(WholePicture(seen.facts["picture"], pair.image), batch, silent)
        record = {**seen.facts, "width": seen.image.width, "height": seen.image.height, **found.record}
        return self._compared(dataclasses.replace(found, record=record), pair)

    def _degraded(self, seen: Seen) -> Degraded | None:
        """The picture made worse, under the name of its file; None if pictures are taken as they are."""
        if self.degrader is None:
            return None
        return self.degrader(seen.image, Path(seen.facts.get("picture") or "in memory").name)

    def _compared(self, prediction: Prediction, pair: Degraded | None) -> Prediction:
        return prediction if self.degrader is None or pair is None else self.degrader.compared(prediction, pair)


def seen_of(item: Any) -> Seen:
    """A picture in RGB, with its facts.

    Args:
        item: as for `Predictor`, or a `Picture`, or `Seen` itself.

    Raises:
        InputError: it cannot be read, or is no picture.
    """
    if isinstance(item, Seen):
        return item
    item = _picture_of(item)
    if isinstance(item, Picture):
        return Seen(item.read(), {"picture": str(item.path)})
    if isinstance(item, Image.Image):
        name = getattr(item, "filename", None) or None
        return Seen(to_rgb(item.copy(), name or "in memory"), {"picture": None if name is None else str(name)})
    if isinstance(item, np.ndarray):
        return Seen(_of_array(item), {"picture": None})
    raise InputError(
        f"a {type(item).__name__} is not a picture; give a path, a picture of Pillow or an array (H, W, 3) of uint8"
    )


def _picture_of(item: Any) -> Any:
    """A path as a `Picture`, and anything else as it is."""
    if not isinstance(item, (str, Path)):
        return item
    path = Path(item).expanduser()
    return Picture(path, path.stem)


def _windows_of(item: Any) -> tuple[Windows, dict[str, Any]]:
    """A picture to be read by windows, with its facts; as `seen_of`."""
    item = _picture_of(item)
    if isinstance(item, Picture):
        return item.windows(), {"picture": str(item.path)}
    image, facts = seen_of(item)
    return WholePicture(facts["picture"] or "in memory", image), facts


def _of_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        raise InputError(
            f"an array {array.shape} of {array.dtype} is not a picture; give (H, W, 3) of uint8, with red first"
        )
    if not array.size:
        raise InputError(f"an array {array.shape} has no pixels")
    return Image.fromarray(np.ascontiguousarray(array.squeeze(2) if array.shape[2:] == (1,) else array)).convert("RGB")


def _is_single(pictures: Any) -> bool:
    if isinstance(pictures, np.ndarray):
        return pictures.ndim < 4
    return isinstance(pictures, (str, Path, Picture, Seen, Image.Image)) or not isinstance(pictures, Iterable)


def _of_file(runtime: str, model: object, min_score: float) -> Engine:
    from terrazzo.tools.predict.files import file_predictor

    if not isinstance(model, (str, Path)):
        raise InputError(f"runtime={runtime!r} runs a file that `terrazzo export` wrote; give its path")
    return file_predictor(runtime, Path(model), min_score)


def _of_network(model: nn.Module, device: torch.device) -> Engine:
    """The engine of a model of timm: a classifier, or a restoration network."""
    if isinstance(getattr(model, "upscale", None), int):
        return RestorePredictor(model, device)
    if not hasattr(model, "pretrained_cfg"):
        raise InputError(
            f"a {type(model).__name__} is not a model of timm, so nothing says how its pictures are prepared; name a "
            "config and a checkpoint"
        )
    return timm_predictor(model, device)


def _of_config(
    model: Any, checkpoint: str | Path | None, device: torch.device, min_score: float, resize: bool
) -> Engine:
    """The engine of a config, by name or in memory."""
    from mmengine.config import Config

    from terrazzo.openmmlab.config import load_config
    from terrazzo.tools import mm
    from terrazzo.tools.predict.openmmlab import config_predictor

    if isinstance(model, (str, Path)):
        cfg = load_config(model)
    elif isinstance(model, Config):
        cfg = model
    else:
        raise InputError(f"a {type(model).__name__} is neither a model nor a config; give a name or a path")
    if checkpoint is None:
        raise InputError(
            f"the config {cfg.filename or 'in memory'} needs weights; name a file that its training wrote: "
            "--checkpoint FILE, or checkpoint=FILE in Python"
        )
    with mm.quiet():
        return config_predictor(cfg, checkpoint, device, min_score, resize)
