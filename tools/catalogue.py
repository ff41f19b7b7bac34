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
    """A model.

    Attributes:
        model, family: their names.
        top1: the authors' ImageNet-1K top-1 in percent, as text; empty if they published none.
        input: height and width of the published weights' images, such as 224x224.
        licence: of the published weights.
    """

    model: str
    family: str
    top1: str
    input: str
    licence: str


def entries() -> list[Entry]:
    """Every model in natural order: from the file, or from timm if the file lacks a family of this checkout."""
    stored = results.read(PATH, Entry)
    return stored if {entry.family for entry in stored} == _families() else registered()


def registered() -> list[Entry]:
    """Every model in natural order, as it is registered with timm."""
    from terrazzo.tools.models import pretrained_cfg, published_top1, registered_models

    found = []
    for name, family in registered_models().items():
        cfg = pretrained_cfg(name)
        top1 = published_top1(cfg)
        size = "x".join(map(str, cfg.input_size[1:]))
        found.append(Entry(name, family, "" if top1 is None else f"{top1:.1f}", size, cfg.license or NO_WEIGHTS))
    return found


def _families() -> set[str]:
    """The names of the families, which are the names of their files."""
    folder = Path(__file__).resolve().parents[1] / "backbones"
    modules = pkgutil.iter_modules([str(folder)])
    return {found.name for found in modules if not (found.ispkg or found.name.startswith("_"))}
