"""What can be measured, and the module that measures it."""

import importlib
from types import ModuleType

from terrazzo import backbones
from terrazzo.errors import InputError
from terrazzo.tools.bench.families import FAMILIES

_OPERATORS = "terrazzo.tools.bench.operators.benchmark"
_BACKBONES = "terrazzo.tools.bench.backbones"
_RUNTIMES = "terrazzo.tools.bench.runtimes"

# Operators share one module, with an entry each in its `OPERATORS`; families share two modules, with an entry each in
# `FAMILIES`. A module has `cases(name, plan)`, `measure(case, plan) -> (rows, reasons)`, `table(rows)` and
# `verdicts(rows, device)`.
KINDS = {
    "operators": {
        "attentive_conv": _OPERATORS,
        "block_sparse_attention": _OPERATORS,
        "grouped_linear": _OPERATORS,
        "neighborhood_attention": "terrazzo.tools.bench.neighborhood.benchmark",
        "selective_scan": _OPERATORS,
        "softmax_free_attention": _OPERATORS,
        "ssd": _OPERATORS,
        "strip_attention": _OPERATORS,
        "token_reduction": _OPERATORS,
        "varlen_attention": _OPERATORS,
    },
    "families": {name: _BACKBONES for name in FAMILIES if name in backbones.FAMILIES},
    # Models of a family with other arguments, against each other.
    "settings": {name: _BACKBONES for name in FAMILIES if name not in backbones.FAMILIES},
    # Runtimes are given a model by its name.
    "runtimes": {
        f"{name}_runtimes": _RUNTIMES for name, family in FAMILIES.items() if family.model not in family.variants
    },
}
"""The benchmarks of each kind: their names, and the modules that measure them."""

BENCHMARKS = {name: module for kind in KINDS.values() for name, module in kind.items()}


def module_of(name: str) -> ModuleType:
    """The module that measures `name`. InputError if nothing does."""
    if name not in BENCHMARKS:
        raise InputError(f"no benchmark is called {name!r}; the benchmarks are: {', '.join(BENCHMARKS)}")
    return importlib.import_module(BENCHMARKS[name])
