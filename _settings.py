"""Parts that configs describe by settings: a `type` and its arguments."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from terrazzo.errors import InputError


def built(what: str, kinds: Mapping[str, Callable], settings: Any, default: str | None = None) -> Any:
    """Build a part.

    Args:
        what: what messages call the part, such as "degradation".
        kinds: what makes the parts, by the names that `type` may have.
        settings: `type` and the arguments; mmengine's scope key is ignored.
        default: the type if there is none.

    Raises:
        InputError: the settings are no dict, the type or an argument is unknown, or an argument is missing.
    """
    arguments = plain(what, settings)
    name = arguments.pop("type", default)
    if not isinstance(name, str) or name not in kinds:
        raise InputError(f"the {what} {name!r} is unknown; choose a type among {', '.join(kinds)}")
    check_arguments(f"{what} {name}", kinds[name], arguments)
    return kinds[name](**arguments)


def plain(what: str, settings: Any) -> dict[str, Any]:
    """Settings as a new dict, without mmengine's scope key.

    Raises:
        InputError: they are no dict.
    """
    if not isinstance(settings, Mapping):
        raise InputError(f"the {what} is {settings!r}; it must be a dict of a type and its arguments")
    return {key: value for key, value in settings.items() if key != "_scope_"}


def check_arguments(what: str, kind: Callable, arguments: Mapping[str, Any]) -> None:
    """Make sure that a class can be called with these arguments.

    Args:
        what: what messages call the part, such as "degradation Haze".
        kind: the class.
        arguments: by their names.

    Raises:
        InputError: an argument is unknown or missing.
    """
    known = inspect.signature(kind).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    named = [name for name, parameter in known.items() if parameter.kind not in _ANY]
    unknown = [key for key in arguments if key not in named]
    if unknown and not open_ended:
        raise InputError(f"the {what} has no argument {unknown[0]!r}; it has {', '.join(named) or 'none'}")
    missing = [name for name in named if known[name].default is inspect.Parameter.empty and name not in arguments]
    if missing:
        raise InputError(f"the {what} needs the argument {missing[0]!r}")


_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
