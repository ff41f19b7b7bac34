"""Which form of an operator runs: requested by argument, by context, by environment variable, or chosen.

The order of precedence is the operator's own `backend=` argument (unless "auto"), the innermost `use_backend`, the
environment variable TERRAZZO_BACKEND (unless empty), and then "auto": the first of fused, portable, reference that can
run. In forward mode and within transforms of `torch.func`, "auto" picks a form of standard operations (see `opaque`).
"""

import contextlib
import contextvars
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from terrazzo.errors import BackendError, InputError
from terrazzo.kernels.dispatch.opaque import MORE, needs_more

BACKENDS = ("auto", "fused", "portable", "reference")
ENVIRONMENT = "TERRAZZO_BACKEND"
_ARGUMENT = "the backend argument"

_context: contextvars.ContextVar[str] = contextvars.ContextVar("terrazzo_backend", default="auto")


@dataclass(frozen=True)
class Choice:
    """The backend that runs, and why: `reasons` maps each refused backend to one sentence."""

    name: str
    asked_by: str
    reasons: Mapping[str, str]

    @property
    def runs(self) -> bool:
        """Whether the backend can run; False only for a backend that was requested by name."""
        return self.name not in self.reasons


def check_name(name: str, asked_by: str = "") -> str:
    """Return `name` if it is a backend.

    Args:
        asked_by: Where the name came from, if not from the caller.

    Raises:
        InputError: `name` is not one of `BACKENDS`.
    """
    if name not in BACKENDS:
        by = f", asked for by {asked_by}," if asked_by else ""
        raise InputError(f"backend {name!r}{by} is not one of {', '.join(BACKENDS)}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Request one backend for every operator call inside the `with` block (this thread or task only).

    Raises:
        InputError: `name` is not one of `BACKENDS`.
    """
    token = _context.set(check_name(name))
    try:
        yield
    finally:
        _context.reset(token)


def consider(requested: str, refusals: Mapping[str, str], discouraged: Mapping[str, str] | None = None) -> Choice:
    """Pick the backend of one call. A backend requested by name is returned even if it cannot run.

    Args:
        requested: The call's own `backend` argument.
        refusals: Why a backend cannot run this call ("fused" -> "needs a CUDA device"). All other backends can run.
        discouraged: Why "auto" skips a backend that can run when requested by name.

    Raises:
        InputError: The requested name is not one of `BACKENDS`.
    """
    asked_by = _ARGUMENT
    if requested == "auto":
        requested, asked_by = _context.get(), "use_backend"
    if requested == "auto":
        requested, asked_by = os.environ.get(ENVIRONMENT) or "auto", f"the environment variable {ENVIRONMENT}"
    check_name(requested, asked_by if asked_by != _ARGUMENT else "")
    if requested == "auto":
        refusals = {**(discouraged or {}), **refusals}
        name = next(name for name in BACKENDS[1:] if name not in refusals)
        return Choice(name, "auto", refusals)
    return Choice(requested, asked_by, refusals)


def choose(
    operator: str,
    requested: str,
    refusals: Mapping[str, str],
    discouraged: Mapping[str, str] | None = None,
    opaque: Sequence[str] = (),
) -> Choice:
    """Pick the backend of one call; see `consider`.

    Args:
        opaque: The backends that run as an opaque op. They cannot run a call that needs more than its one gradient.

    Raises:
        BackendError: A backend was requested by name and is among the refusals.
        InputError: The requested name is not one of `BACKENDS`.
    """
    if needs_more():
        refusals = {**dict.fromkeys(opaque, MORE), **refusals}
    choice = consider(requested, refusals, discouraged)
    if not choice.runs:
        raise BackendError(
            f"{operator}: backend {choice.name!r}, asked for by {choice.asked_by}, cannot run here: "
            f"{choice.reasons[choice.name]}"
        )
    return choice
