"""One trained ViT and changed forms of it, measured in turns: time, memory, what is selected, how far maps drift."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import nn

from terrazzo.errors import TerrazzoError
from terrazzo.tools import results
from terrazzo.tools.data.pictures import to_tensor
from terrazzo.tools.inspect.attention_clock import AttentionClock, AttentionTimer
from terrazzo.tools.inspect.coverage import watched
from terrazzo.tools.inspect.maps import last_map, map_cosine
from terrazzo.tools.inspect.memory import PeakMemory
from terrazzo.tools.inspect.timing import FORWARD, Quantiles, interleaved, quantiles, reason_of
from terrazzo.tools.mechanisms import DENSE, Mechanism, calibrate_if_possible, on_meta

ATTENTION, MIXING, MEMORY, DENSITY, MASS, MAP = (
    "attention",
    "mixing",
    "peak memory",
    "density",
    "attention mass",
    "cosine of the map",
)
METRICS = {FORWARD: "ms", ATTENTION: "ms", MIXING: "ms", MEMORY: "MiB", DENSITY: "1", MASS: "1", MAP: "1"}
"""The metrics of a form at a size, and their units. Density and mass are missing where nothing is selected.

Mixing is attention without the linear layers of the host: queries, keys and values to the mixed values.
"""
_TURNS = 3

Found = dict[tuple[str, str], Quantiles]


class MechanismBench:
    """Measures forms of one model.

    Args:
        dense: a host of `convert_attention`, on `device`.
        mechanisms: the forms.
        config: timm's data config of the model, with mean and std of colours.
        device: where to measure.
        seconds: time for each form and size.
        calibration: pictures to calibrate mixers on, at each size; none to calibrate nothing.
    """

    def __init__(
        self,
        dense: nn.Module,
        mechanisms: Sequence[Mechanism],
        config: Mapping[str, Any],
        device: torch.device,
        seconds: float,
        calibration: Sequence[Image.Image] = (),
    ):
        self.models = {mechanism.name: mechanism.on(dense) for mechanism in (DENSE, *mechanisms)}
        self.clocks, self.projections = {}, {}
        for name, model in self.models.items():
            modules = [block.attn for block in model.blocks]
            linear = [part for attn in modules for part in attn.children() if isinstance(part, nn.Linear)]
            self.clocks[name] = AttentionClock(modules, device)
            self.projections[name] = AttentionClock(linear, device)
        self.config, self.device, self.seconds, self.calibration = config, device, seconds, calibration

    def steps(self, pictures: int) -> int:
        """How often `measure` calls `done`."""
        return len(self.models) * (pictures + 1) + 1

    def check(self, size: tuple[int, int]) -> None:
        """InputError if the dense model cannot take images of a size. Nothing is computed."""
        last_map(on_meta(self.models[DENSE.name]), torch.empty(1, 3, *size, device="meta"))

    def measure(
        self, pictures: Sequence[Image.Image], size: tuple[int, int], done: Callable[[], None]
    ) -> tuple[Found, dict[str, str]]:
        """The figures by form and metric, p20, p50 and p80, and a reason for each form without figures."""
        images, others = self._images(pictures, size), self._images(self.calibration, size)
        found: Found = {}
        reasons: dict[str, str] = {}
        dense: list[torch.Tensor] = []
        for name, model in self.models.items():
            try:
                if others:
                    calibrate_if_possible(model, others)
                figures, maps = self._figures(model, images, dense, done)
            except (TerrazzoError, RuntimeError, ValueError, MemoryError) as error:
                if name == DENSE.name:
                    raise
                reasons[name] = str(error) if isinstance(error, TerrazzoError) else reason_of(error)
                continue
            dense = dense or maps
            found |= {(name, metric): (value,) * 3 for metric, value in figures.items() if value is not None}
        calls = {
            name: partial(last_map, model, images[0]) for name, model in self.models.items() if name not in reasons
        }
        timer = AttentionTimer(
            self.device,
            {call: self.clocks[name] for name, call in calls.items()},
            {call: self.projections[name] for name, call in calls.items()},
        )
        times = interleaved(calls, self.seconds, timer, _TURNS)
        for name, call in calls.items():
            attention, linear = timer.attention[call], timer.projections[call]
            mixing = [whole - part for whole, part in zip(attention, linear)]
            of = {FORWARD: times[name], ATTENTION: quantiles(attention), MIXING: quantiles(mixing)}
            found |= {(name, metric): tuple(1e3 * second for second in seconds) for metric, seconds in of.items()}
        done()
        return found, reasons

    def _images(self, pictures: Sequence[Image.Image], size: tuple[int, int]) -> list[torch.Tensor]:
        mean, std = self.config["mean"], self.config["std"]
        return [to_tensor(picture, size, mean, std, crop=True).to(self.device) for picture in pictures]

    def _figures(
        self, model: nn.Module, images: Sequence[torch.Tensor], dense: Sequence[torch.Tensor], done: Callable[[], None]
    ) -> tuple[dict[str, float | None], list[torch.Tensor]]:
        """What needs no clock, and the maps; these passes also warm the model up."""
        maps = []
        with watched(model) as coverage:
            for image in images:
                maps.append(last_map(model, image).cpu())
                done()
        with PeakMemory(self.device) as peak:
            last_map(model, images[0])
        done()
        cosines = [map_cosine(*pair) for pair in zip(maps, dense or maps)]
        figures = {
            MEMORY: None if peak.bytes is None else peak.bytes / 2**20,
            DENSITY: coverage.density,
            MASS: coverage.mass,
            MAP: sum(cosines) / len(cosines),
        }
        return figures, maps


def table(rows: Sequence[results.Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines: a line for each size and form, with times as gains over the dense model's."""
    figures = {(row.shape, row.backend, row.metric): row.p50 for row in rows}
    lines = []
    for shape, name in dict.fromkeys((row.shape, row.backend) for row in rows):

        def cell(metric: str, text: str, at: tuple[str, str] = (shape, name)) -> str:
            value = figures.get((*at, metric))
            return "" if value is None else text.format(value)

        def gain(metric: str, at: tuple[str, str] = (shape, name)) -> str:
            return f"{gain_of(figures, *at, metric):.2f} x"

        lines.append(
            (
                shape.split("x", 2)[2],
                name,
                cell(FORWARD, "{:.1f}"),
                gain(FORWARD),
                cell(ATTENTION, "{:.1f}"),
                gain(ATTENTION),
                cell(MEMORY, "{:.0f}"),
                cell(DENSITY, "{:.3f}"),
                cell(MASS, "{:.3f}"),
                cell(MAP, "{:.4f}"),
            )
        )
    head = ("image", "mixer", "model, ms", "faster", "attention, ms", "faster", "peak, MiB", DENSITY, MASS, MAP)
    return head, lines


def gain_of(figures: Mapping[tuple[str, str, str], float], shape: str, name: str, metric: str = FORWARD) -> float:
    """How many times as fast as the dense model a form is, from medians by shape, form and metric."""
    return figures[shape, DENSE.name, metric] / figures[shape, name, metric]
