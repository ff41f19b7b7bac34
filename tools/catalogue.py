"""The facts that `terrazzo list` prints of every model, stored so that listing imports neither PyTorch nor timm.

`terrazzo cards` writes the file from what the models are registered with, and a test fails if the file is stale.
"""

import pkgutil
from dataclasses import dataclass
from pathlib import Path

from terrazzo.tools import results

PATH = results.FOLDER / "catalogue.csv"

NO_WEIGHTS = "no weights"
"""Takes the place of a licence if the authors published no weights: the model is a reconstruction."""


@dataclass(frozen=True)
class Entry:
    """A model: a backbone, or a restoration network, which has a scale and tasks.

    Attributes:
        model, family: their names.
        top1: the authors' ImageNet-1K top-1 in percent, as text; empty if they published none.
        scale: how many times larger a restoration network makes pictures, as text; empty for a backbone.
        tasks: what a restoration network is for; empty for a backbone.
        input: height and width of the published weights' images, such as 224x224.
        licence: of the published weights.
    """

    model: str
    family: str
    top1: str
    scale: str
    tasks: str
    input: str
    licence: str


def entries() -> list[Entry]:
    """Every model, backbones first: from the file, or from timm if the file lacks a family of this checkout."""
    stored = results.read(PATH, Entry)
    return stored if {entry.family for entry in stored} == _families() else registered()


def registered() -> list[Entry]:
    """Every model as it is registered with timm: backbones, then restoration networks, each in natural order."""
    from terrazzo.restoration._registration import purpose_of
    from terrazzo.tools.models import EVERY_MODEL, family_of, pretrained_cfg, published_top1, registered_models

    found = []
    for name, family in registered_models(EVERY_MODEL).items():
        cfg = pretrained_cfg(name)
        top1, scale, tasks = published_top1(cfg), "", ""
        if family_of(name, ("restoration",)):
            purpose = purpose_of(name)
            scale, tasks = str(purpose.upscale), ", ".join(purpose.tasks)
        size = "x".join(map(str, cfg.input_size[1:]))
        about = ("" if top1 is None else f"{top1:.1f}", scale, tasks, size, cfg.license or NO_WEIGHTS)
        found.append(Entry(name, family, *about))
    return found


def _families() -> set[str]:
    """The names of the families, which are the names of their files."""
    root = Path(__file__).resolve().parents[1]
    modules = pkgutil.iter_modules([str(root / package) for package in ("backbones", "restoration")])
    return {found.name for found in modules if not (found.ispkg or found.name.startswith("_"))}
