"""The tables of README.md, docs/ and the model cards, made from the registry and the result files.

A table stands between `<!-- table: KIND ARGUMENT -->` and `<!-- end of table -->`; the text between them is replaced.
"""

import importlib
import re
from collections.abc import Callable
from pathlib import Path

import click

from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.reports import capabilities as capability_results
from terrazzo.tools.reports import precision as precision_results
from terrazzo.tools.reports import zoo as zoo_results

_TABLE = re.compile(r"(<!-- table: (\w+)(?: ([^ ]+))? -->\n).*?(<!-- end of table -->)", re.DOTALL)


CARDS = results.FOLDER.parent


MODELS = results.FOLDER / "models.csv"
COUNTS = {"backbones": MODELS, "restoration": results.FOLDER / "restoration.csv"}
"""Files of counts, by the package of terrazzo that registers the models."""

_SCALING = "scaling_cpu.csv"


def measure_models(package: str = "backbones") -> list[results.Row]:
    """Parameters, multiply-adds and activations of every model that a package registers, at its default size."""
    from terrazzo.tools.models import registered_models

    with click.progressbar(sorted(registered_models((package,))), label=f"counting {package}") as models:
        return [row for name in models for row in measure_model(name)]


def measure_model(name: str) -> list[results.Row]:
    """Parameters, multiply-adds and activations of a registered model at its default size."""
    from terrazzo.tools.inspect.measure import measure
    from terrazzo.tools.models import EVERY_MODEL, build_on_meta, family_of, pretrained_cfg

    size = pretrained_cfg(name).input_size
    found = measure(build_on_meta(name), size[1:], size[0])
    rows = []
    for metric, value in (
        ("parameters", found.params),
        ("multiply-adds", found.macs),
        ("activations", found.activations),
    ):
        count = float(value)
        # A count does not depend on where or when it was made.
        facts = (family_of(name, EVERY_MODEL), name, f"1x{'x'.join(map(str, size))}", "float32", "meta", metric, "1")
        rows.append(results.Row(*facts, count, count, count, "any", "any", ""))
    return rows


def _markdown(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in (head, rule, *lines))


def _counts(family: str | None = None) -> dict[str, dict[str, float | str]]:
    """By model, in order of multiply-adds: its family, the shape of its images and what was counted, by metric."""
    counts: dict[str, dict[str, float | str]] = {}
    for row in results.read(MODELS):
        if family in (None, row.what):
            counts.setdefault(row.variant, dict(family=row.what, shape=row.shape))[row.metric] = row.p50
    if not counts:
        raise InputError(f"{MODELS} has no rows of {family!r}; run `terrazzo cards --count`")
    return dict(sorted(counts.items(), key=lambda item: item[1]["multiply-adds"]))


def _variants(family: str) -> str:
    """Every variant of a family: what was counted here, and what its authors published."""
    from terrazzo.tools.models import NO_WEIGHTS, pretrained_cfg, published_top1

    lines = []
    for name, found in _counts(family).items():
        cfg = pretrained_cfg(name)
        top1 = published_top1(cfg)
        lines.append(
            (
                f"`{name}`",
                f"{found['parameters'] / 1e6:.2f}",
                f"{found['multiply-adds'] / 1e9:.2f}",
                found["shape"].rsplit("x", 1)[1],
                "-" if top1 is None else f"{top1:.1f}",
                cfg.license or NO_WEIGHTS,
            )
        )
    return _markdown(("model", "params, M", "MACs, G", "at", "published top-1, %", "weights' licence"), lines)


def _families(_: None) -> str:
    """A line for each family, linked to its card: how many models, and the ranges of their sizes and accuracies."""
    from terrazzo.tools.models import NO_WEIGHTS, pretrained_cfg, published_top1

    models: dict[str, dict[str, dict]] = {}
    for name, found in _counts().items():
        models.setdefault(found["family"], {})[name] = found
    lines = []
    growth = _growth()
    for family, members in sorted(models.items()):
        title = (CARDS / f"{family}.md").read_text().split("\n", 1)[0].removeprefix("# ")
        cfgs = [pretrained_cfg(name) for name in members]
        lines.append(
            (
                f"[{title}](model_cards/{family}.md)",
                f"{len(members)}: `{next(iter(members))}` ...",
                _range([found["parameters"] / 1e6 for found in members.values()]),
                _range([found["multiply-adds"] / 1e9 for found in members.values()]),
                _range([top1 for cfg in cfgs if (top1 := published_top1(cfg)) is not None]),
                next((f"{growth[name]:.2f}" for name in members if name in growth), "-"),
                ", ".join(sorted({cfg.license or NO_WEIGHTS for cfg in cfgs})),
            )
        )
    head = ("family", "models", "params, M", "MACs, G", "published top-1, %", "growth of time", "weights' licence")
    return _markdown(head, lines)


def _range(values: list[float]) -> str:
    """The smallest and the largest, to one decimal."""
    if not values:
        return "-"
    return " to ".join(dict.fromkeys((f"{min(values):.1f}", f"{max(values):.1f}")))


def _bench(name: str) -> str:
    """The speed of an operator or a family, from its result file, with the machine it was measured on.

    `name` means the rows of a CPU; `name` with the suffix `_gpu` means the rows of a GPU.
    """
    from terrazzo.tools.bench.registry import BENCHMARKS, module_of

    bare, device = (name, "cpu") if name in BENCHMARKS else (name.removesuffix("_gpu"), "cuda")
    module = module_of(bare)
    path = results.FOLDER / f"{bare}_{'gpu' if device == 'cuda' else 'cpu'}.csv"
    rows = results.read(path) if path.exists() else []
    if not rows:
        raise InputError(f"{path} has no rows; run `terrazzo bench {bare} --device {device} --out {path}`")
    head, lines = module.table(rows)
    return _markdown(head, lines) + f"\nMeasured on {_machines(rows)}, {rows[0].versions}, medians.\n"


def _training(name: str) -> str:
    """What `terrazzo compare` found: backbones under one recipe, with the budget that they had."""
    rows = results.read(results.FOLDER / f"training_{name}.csv")
    metrics = [metric for metric in dict.fromkeys(row.metric for row in rows) if metric != "backbone parameters"]
    found = {(row.variant, row.metric): row for row in rows}
    lines = []
    for variant in dict.fromkeys(row.variant for row in rows):
        count = found[variant, "backbone parameters"].p50 / 1e6
        lines.append((f"`{variant}`", f"{count:.1f}", *(_spread(found[variant, metric]) for metric in metrics)))
    head = ("backbone", "its params, M", *metrics)
    return _markdown(head, lines) + f"\n{rows[0].shape}: {rows[0].backend}, on {_machines(rows)}, {rows[0].versions}.\n"


def _machines(rows: list[results.Row]) -> str:
    return " and ".join(dict.fromkeys(row.device for row in rows))


def _spread(row: results.Row) -> str:
    """The median, and the 20th and 80th percentile if runs differ."""
    return f"{row.p50:.3g}" + (f" ({row.p20:.3g} to {row.p80:.3g})" if row.p20 < row.p80 else "")


def _precision(name: str) -> str:
    """What half precision and INT8 cost a family, on the data of its configs."""
    rows = results.read(results.FOLDER / f"{name}_precision.csv")
    note = "Points of 100 on the test data; layer errors are rms of the difference to float32 / rms."
    return _markdown(*precision_results.table(rows)) + f"\n{note} {_machines(rows)}, {rows[0].versions}.\n"


def _zoo(argument: str | None) -> str:
    """How many configs of mmdet and mmseg `terrazzo doctor openmmlab` could build."""
    rows = results.read(zoo_results.PATH)
    return _markdown(*zoo_results.table(rows)) + "\n" + "\n".join(zoo_results.notes(rows)) + "\n"


def _capabilities(family: str | None) -> str:
    """What every family, or one family, can do, as the tests found it."""
    cells = [cell for cell in capability_results.read().values() if family in (None, cell.family)]
    table = capability_results.table(cells) if family is None else capability_results.family_table(cells, family)
    return _markdown(*table) + "\n" + "\n".join(capability_results.notes(cells)) + "\n"


def _configs(_: None) -> str:
    """Every packaged config, by the data that its name ends with, and by task."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted((results.ROOT / "configs").glob("[!_]*/*.py")):
        data = re.sub(r"-\d+x\d+$|-?\d+$|-(instance|panoptic)$", "", path.stem.rsplit("_", 1)[-1])
        found.setdefault((data, path.parent.name), []).append(f"`{path.stem}`")
    return _markdown(("data", "task", "configs"), [(*key, ", ".join(names)) for key, names in sorted(found.items())])


def _mixers(_: None) -> str:
    """Every mixer: what it is, whether it works without training, and its options."""
    from terrazzo.backbones.mixers import mixer_class, mixers, options_of
    from terrazzo.tools.mechanisms import without_parameters
    from terrazzo.tools.models import build_on_meta

    free = [*without_parameters(build_on_meta("test_vit")), "softmax"]
    lines = []
    for name in mixers():
        module = importlib.import_module(mixer_class(name).__module__)
        what = module.__doc__.split("\n", 1)[0].rstrip(".")
        options = ", ".join(f"`{option}`" for option in options_of(name))
        lines.append(
            (
                f"`{name}`",
                what,
                "none" if name in free else "of its own",
                "yes" if mixer_class(name).needs_grid else "no",
                options or "-",
            )
        )
    return _markdown(("mixer", "what it is", "parameters", "needs a grid", "options"), lines)


def _mixer_speed(name: str) -> str:
    """What `terrazzo bench mixers` found, from mixers_NAME.csv."""
    from terrazzo.tools.bench.mechanisms import table

    return _measured(f"mixers_{name}.csv", table, "terrazzo bench mixers MODEL --pictures DIR --out FILE")


def _reducers(name: str) -> str:
    """What `terrazzo bench reduce --methods` found, from reducers_NAME.csv."""
    from terrazzo.tools.bench.reducers import table

    return _measured(f"reducers_{name}.csv", table, "terrazzo bench reduce MODEL --methods all --out FILE")


def _probe(name: str) -> str:
    """What `terrazzo probe segmentation` found, from probe_NAME.csv."""
    from terrazzo.tools.probe.outcomes import outcomes_of, table

    command = "terrazzo probe segmentation MODEL --data-root DIR --size H W --out DIR"
    return _measured(f"probe_{name}.csv", lambda rows: table(outcomes_of(rows)), command)


def _scaling(_: None) -> str:
    """What `terrazzo bench scaling` found."""
    from terrazzo.tools.bench.exponents import table

    return _measured(_SCALING, table, "terrazzo bench scaling --out FILE")


def _tiled(_: None) -> str:
    """What `terrazzo bench tiled` found."""
    from terrazzo.tools.bench.tiled import table

    return _measured("tiled_cpu.csv", table, "terrazzo bench tiled --out FILE")


def _field(name: str) -> str:
    """What `terrazzo probe field` found, from field_NAME.csv."""
    from terrazzo.tools.probe.field import radii_of
    from terrazzo.tools.probe.receptive import table

    return _measured(f"field_{name}.csv", lambda rows: table(radii_of(rows)), "terrazzo probe field --out DIR")


def _binding(name: str) -> str:
    """What `terrazzo probe binding` found at the best levels, from binding_NAME.csv."""
    from terrazzo.tools.probe.objects.outcomes import best, outcomes_of, table

    def made(rows: list[results.Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        outcomes = outcomes_of(rows)
        return table(best(outcomes), outcomes)

    return _measured(f"binding_{name}.csv", made, "terrazzo probe binding MODEL --data-root DIR --out DIR")


def _growth() -> dict[str, float]:
    """The exponent with which the time of a model grows with pixels, by model, as far as measured."""
    from terrazzo.tools.bench.exponents import by_model, exponent
    from terrazzo.tools.inspect.timing import FORWARD

    path = results.FOLDER / _SCALING
    rows = results.read(path) if path.exists() else []
    return {name: exponent(times) for name, times in by_model(rows, FORWARD).items()}


def _measured(name: str, table: Callable, command: str) -> str:
    """A table of a result file; a sentence if nobody has measured yet."""
    path = results.FOLDER / name
    if not path.exists():
        return f"Not measured yet: `{command}` writes the rows of `model_cards/results/{name}`.\n"
    rows = results.read(path)
    models = {row.variant for row in rows}
    what = f"{rows[0].variant}; " if len(models) == 1 else ""
    if rows[0].what.startswith("segmentation probe"):
        what = f"{rows[0].variant}, {rows[0].what}; "
    return _markdown(*table(rows)) + f"\n{what}{_machines(rows)}, {rows[0].versions}.\n"


def _front(metric: str) -> str:
    """The models that no other model beats in published accuracy and in a counted metric, such as "parameters"."""
    from terrazzo.tools.reports import choice

    return _markdown(*choice.front_table(metric))


def _times(_: None) -> str:
    """The models that were timed on a CPU, with the runtimes side by side."""
    from terrazzo.tools.reports import choice

    return _markdown(*choice.time_table())


TABLES: dict[str, Callable[[str | None], str]] = {
    "families": _families,
    "front": _front,
    "times": _times,
    "variants": _variants,
    "bench": _bench,
    "training": _training,
    "zoo": _zoo,
    "capabilities": _capabilities,
    "configs": _configs,
    "precision": _precision,
    "mixers": _mixers,
    "mixer_speed": _mixer_speed,
    "probe": _probe,
    "scaling": _scaling,
    "tiled": _tiled,
    "field": _field,
    "binding": _binding,
    "reducers": _reducers,
}


def render(text: str, above: str = "") -> str:
    """`text` with every table made again.

    Args:
        text: A page.
        above: The path from the page's folder to the root, such as "../": tables link to files from the root.

    Raises:
        InputError: A table of an unknown kind.
    """

    def fresh(match: re.Match) -> str:
        opening, kind, argument, closing = match.groups()
        if kind not in TABLES:
            raise InputError(f"no table is called {kind!r}; the tables are: {', '.join(TABLES)}")
        return f"{opening}\n{TABLES[kind](argument).replace('](', f']({above}')}\n{closing}"

    return _TABLE.sub(fresh, text)


def pages(root: Path = results.ROOT) -> list[Path]:
    """Every page that may have tables."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md")), *sorted((root / "model_cards").glob("*.md"))]
