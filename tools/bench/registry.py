"""What can be measured, and the module that measures it."""

import importlib
from types import ModuleType

from terrazzo.errors import InputError
from terrazzo.tools.bench.families import FAMILIES

# Operators share one module, with an entry each in its `OPERATORS`; families share two modules, with an entry each in
# `FAMILIES`. A module has `cases(name, plan)`, `measure(case, plan) -> (rows, reasons)`, `table(rows)` and
# `verdicts(rows, device)`.
BENCHMARKS = {
    "attentive_conv": "terrazzo.tools.bench.operators.benchmark",
    "neighborhood_attention": "terrazzo.tools.bench.neighborhood.benchmark",
    "selective_scan": "terrazzo.tools.bench.operators.benchmark",
    "strip_attention": "terrazzo.tools.bench.operators.benchmark",
    "token_reduction": "terrazzo.tools.bench.operators.benchmark",
    "varlen_attention": "terrazzo.tools.bench.operators.benchmark",
    **dict.fromkeys(FAMILIES, "terrazzo.tools.bench.backbones"),
    # Runtimes are given a model by its name.
    **{f"{name}_runtimes": "terrazzo.tools.bench.runtimes" for name, family in FAMILIES.items() if not family.variants},
}


def module_of(name: str) -> ModuleType:
    """The module that measures `name`. InputError if nothing does."""
    if name not in BENCHMARKS:
        raise InputError(f"no benchmark is called {name!r}; the benchmarks are: {', '.join(BENCHMARKS)}")
    return importlib.import_module(BENCHMARKS[name])
