"""Linear probes of several forms of one model, on pixels: the dense model's maps are computed once for all."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from terrazzo.tools.console import steps
from terrazzo.tools.data.labelled import LabelledPictures, Split
from terrazzo.tools.data.pictures import Picture, to_tensor
from terrazzo.tools.inspect.maps import last_map, map_cosine
from terrazzo.tools.mechanisms import DENSE, Mechanism, calibrate_if_possible
from terrazzo.tools.probe.features import Maps, maps_of
from terrazzo.tools.probe.linear import LinearProbe, Recipe, Scores, fit, predict
from terrazzo.tools.probe.outcomes import Outcome

FITS = {"dense": "", "own": ", own probe"}
"""On which maps a probe is trained: the dense model's or the mechanism's own. The texts name its outcomes."""
_DRAWN = 4


class PixelProbing:
    """Probes on a data set.

    Args:
        data: pictures and label maps.
        size: (H, W) of the models' images.
        config: timm's data config of the model, with mean and std of colours.
        recipe: how probes are trained.
        device: where the models are.
    """

    def __init__(
        self,
        data: LabelledPictures,
        size: tuple[int, int],
        config: Mapping[str, Any],
        recipe: Recipe,
        device: torch.device,
    ):
        self.data, self.size, self.config, self.recipe, self.device = data, size, config, recipe, device

    def check(self, dense: nn.Module, models: Mapping[Mechanism, nn.Module]) -> None:
        """Run every model on a picture, so that a model that cannot run ends the command early, with an InputError."""
        image = self._image(self.data.train.pictures[0]).to(self.device)
        last_map(dense, image)
        for mechanism, model in models.items():
            with mechanism.blamed():
                last_map(model, image)

    def calibrate(self, models: Mapping[Mechanism, nn.Module], count: int) -> list[str]:
        """Calibrate mixers on the first training pictures; the names of the models in which any could be calibrated."""
        images = [self._image(picture).to(self.device) for picture in self.data.train.pictures[:count]]
        return [mechanism.name for mechanism, model in models.items() if calibrate_if_possible(model, images)]

    def run(self, dense: nn.Module, models: Mapping[Mechanism, nn.Module], fits: Sequence[str]) -> Iterator[Outcome]:
        """The outcomes, as they are found: the dense model's, then each mechanism's for each of `fits`."""
        name = DENSE.name
        shared = self._fit(name, self._maps(name, dense, self.data.train))
        val = self._maps(name, dense, self.data.val)
        yield self._outcome(name, shared, val, val)
        for mechanism, model in models.items():
            own = self._maps(mechanism.name, model, self.data.val)
            for kind in fits:
                probe = shared
                if kind == "own":
                    probe = self._fit(mechanism.name, self._maps(mechanism.name, model, self.data.train))
                yield self._outcome(mechanism.name + FITS[kind], probe, own, val)

    def _image(self, picture: Picture) -> torch.Tensor:
        return to_tensor(picture.read(), self.size, self.config["mean"], self.config["std"])

    def _maps(self, name: str, model: nn.Module, split: Split) -> Maps:
        images = map(self._image, split.pictures)
        with steps(f"{name}: maps", len(split.pictures)) as done:
            return maps_of(model, images, len(split.pictures), self.device, done)

    def _fit(self, name: str, maps: Maps) -> LinearProbe:
        height, width = self.size
        small = [
            np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))
            for labels in self.data.train.labels
        ]
        labels = torch.from_numpy(np.stack(small))
        with steps(f"{name}: probe", self.recipe.steps) as done:
            return fit(maps, labels, len(self.data.classes), self.data.ignored, self.recipe, self.device, done)

    def _outcome(self, name: str, probe: LinearProbe, maps: Maps, dense: Maps) -> Outcome:
        count = len(maps)
        scores = Scores(len(self.data.classes), self.data.ignored)
        drawn = {round(i * (count - 1) / max(1, _DRAWN - 1)) for i in range(_DRAWN)}
        kept, cosines = {}, []
        with steps(f"{name}: scores", count) as done:
            for index, labels in enumerate(self.data.val.labels):
                predicted = predict(probe, maps[index].to(self.device), labels.shape)
                scores.add(predicted, torch.from_numpy(labels).long())
                cosines.append(map_cosine(maps[index][None], dense[index][None]))
                if index in drawn:
                    kept[index] = predicted.numpy().astype(np.uint8)
                done()
        return Outcome(name, *scores.percent(), sum(cosines) / count, kept)
