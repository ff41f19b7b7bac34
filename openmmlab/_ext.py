"""The replacement for `mmcv._ext`, mmcv's compiled operators, if no compiled mmcv is installed."""

import functools

from terrazzo.errors import BackendError
from terrazzo.openmmlab.ops import OPERATORS

NAME = "mmcv._ext"


class MissingOperator:
    """Stands for an operator that terrazzo does not provide: `mmcv.ops` can be imported, and a call says what to do."""

    def __init__(self, name: str):
        self.__name__ = name

    def __call__(self, *args, **kwargs):
        raise BackendError(
            f"mmcv operator '{self.__name__}' is not provided by terrazzo.openmmlab, which stands in for mmcv's "
            "compiled operators (`terrazzo doctor openmmlab` lists its operators); install an mmcv compiled for "
            "this PyTorch, or choose a config without this operator"
        )

    def __repr__(self) -> str:
        return f"<missing mmcv operator '{self.__name__}'>"


@functools.cache
def _missing(name: str) -> MissingOperator:
    """The stand-in for an operator by name. Underscored names are Python's own probing, not operators.

    Raises:
        AttributeError: for an underscored name.
    """
    if name.startswith("_"):
        raise AttributeError(f"module '{NAME}' has no attribute '{name}'")
    return MissingOperator(name)


MODULES = {NAME: {**OPERATORS, "__getattr__": _missing}}
"""The names in the module: the operators, and a `MissingOperator` for every other name."""
