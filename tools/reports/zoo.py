"""What `terrazzo doctor openmmlab` found, as counts: the rows of its result file, and the table made from them."""

import importlib.metadata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from terrazzo.tools import results

PATH = results.FOLDER / "openmmlab_zoo.csv"

DISTRIBUTIONS = {
    **{"mmdet": "mmdet", "mmseg": "mmsegmentation", "mmpretrain": "mmpretrain", "mmpose": "mmpose"},
    **{"mmrotate": "mmrotate", "mmyolo": "mmyolo", "mmaction": "mmaction2", "mmocr": "mmocr", "mmdet3d": "mmdet3d"},
    "mmagic": "mmagic",
}
"""OpenMMLab's packages with configs, and the names under which pip installs them."""

BUILT = "built"
NEEDS = "needs package"
LACKS = "lacks operator"
FAULTY = "faulty as shipped"
FAILED = "failed"
NO_MODEL = "no model"
STATUSES = (BUILT, NEEDS, LACKS, FAULTY, FAILED, NO_MODEL)

_WANTING = {"needs": NEEDS, "lacks": LACKS}
MODELS = "distinct models"
LISTED = 10
"""How many packages or operators the notes list."""


@dataclass(frozen=True)
class Finding:
    """What became of a config.

    Attributes:
        status: one of `STATUSES`.
        reason: one line; for missing packages or operators, their names, comma-separated; may be empty.
    """

    status: str
    reason: str = ""


@dataclass(frozen=True)
class Examined:
    """A config that was examined: its package and path there, what became of it, and the digest of its model."""

    package: str
    config: str
    finding: Finding
    model: str


def count(examined: Sequence[Examined]) -> list[results.Row]:
    """The counts of each package."""
    rows = []
    for package in dict.fromkeys(item.package for item in examined):
        items = [item for item in examined if item.package == package]
        statuses = Counter(item.finding.status for item in items)
        counts = {status: statuses[status] for status in STATUSES}
        counts[MODELS] = len({item.model for item in items if item.model})
        for verb, status in _WANTING.items():
            names = Counter(n for i in items if i.finding.status == status for n in i.finding.reason.split(", "))
            counts |= {f"{verb} {name}": names[name] for name in sorted(names)}
        versions = _versions(package)
        commit = results.commit()
        for metric, n in counts.items():
            rows.append(
                results.Row("openmmlab_zoo", package, "", "", "", metric, "1", n, n, n, "any", versions, commit)
            )
    return rows


def table(rows: Sequence[results.Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines: a line for each package."""
    head = ("package", "configs", MODELS, *STATUSES[:-1])
    lines = []
    for package in dict.fromkeys(row.variant for row in rows):
        counts = {row.metric: int(row.p50) for row in rows if row.variant == package}
        statuses = [counts[status] for status in STATUSES[:-1]]
        lines.append((_named(package, rows), *map(str, (sum(statuses), counts[MODELS], *statuses))))
    return head, lines


def notes(rows: Sequence[results.Row]) -> list[str]:
    """Sentences below the table: what the packages and operators are, and with which versions it was counted."""
    said = []
    packages = list(dict.fromkeys(row.variant for row in rows))
    for verb, what in (("needs", "Packages needed"), ("lacks", "Operators lacking")):
        for package in packages:
            names = Counter()
            for row in rows:
                if row.variant == package and row.metric.startswith(f"{verb} ") and row.metric not in STATUSES:
                    names[row.metric.removeprefix(f"{verb} ")] += int(row.p50)
            if names:
                listed = [f"{name} ({n})" for name, n in names.most_common(LISTED)]
                more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
                by = f" {'by' if verb == 'needs' else 'in'} {package}" if len(packages) > 1 else ""
                said.append(f"{what}{by}: {', '.join(listed)}{more}.")
    versions = sorted({part for row in rows for part in row.versions.split(", ")})
    said.append(f"Counted with {', '.join(versions)}.")
    return said


def _named(package: str, rows: Sequence[results.Row]) -> str:
    """A package with its version."""
    versions = next(row.versions for row in rows if row.variant == package).split(", ")
    own = f"{DISTRIBUTIONS.get(package)} "
    return " ".join([package, *(version.removeprefix(own) for version in versions if version.startswith(own))])


def _versions(package: str) -> str:
    """The versions on which the counts of a package depend."""
    own = (DISTRIBUTIONS[package],) if package in DISTRIBUTIONS else ()
    installed = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    names = (*own, "mmcv-lite", "mmcv", "mmengine", "torch")
    return ", ".join(f"{name} {installed[name]}" for name in names if name in installed)
