"""What families say of their weights, and what their `checkpoint_filter_fn` needs: unwrapping, renaming, resizing."""

import functools
import inspect
import itertools
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from terrazzo.backbones._names import registered_models
from terrazzo.errors import InputError, WeightsError, first_line

RECONSTRUCTED = "reconstructed from the paper; no public weights of the authors load"
"""What a family whose authors published neither code nor weights says of itself: docstring, configuration and card."""

_LICENCES = {
    r"levels\.\d+\.blocks\.\d+\.mixer\.A_log": (
        "MambaVision's weights, by NVIDIA, are licensed CC-BY-NC-SA-4.0: no commercial use, and what is made from them "
        "is shared alike"
    ),
}
"""By a name that only the authors' checkpoints have: what whoever takes their weights must know."""

_logger = logging.getLogger(__name__)

_AVERAGED = ("state_dict_ema", "model_ema", "ema")
"""Under which keys training programs keep averaged weights. mmengine's `ema_state_dict` is not among them: where there
is one, `state_dict` has the average, and it has the weights before averaging."""

_WEIGHTS = ("state_dict", "model", "module", "model_state_dict", "net", "network", "weights")

_COUNTERS = ("steps", "n_averaged")
"""What an average counts its updates in."""


def weights_of(checkpoint: Any, ema: bool | None = None) -> dict[str, torch.Tensor]:
    """The named tensors of a checkpoint, wherever a training program put them: the one place that knows where.

    They may lie under `state_dict`, `model` or another usual key, also under more than one. Dicts in them are joined by
    dots, arrays of NumPy become tensors, and other values are left out. `module.` and `_orig_mod.`, which
    DistributedDataParallel and torch.compile put before every name, go.

    Args:
        checkpoint: what a file held.
        ema: True for what EMA set aside, False for the other weights, None for averaged ones where there are any.

    Raises:
        InputError: there are none; the message is the end of a sentence that begins with the file.
    """
    if not isinstance(checkpoint, Mapping):
        raise InputError(f"holds a {type(checkpoint).__name__}, and weights are a dict of names and tensors")
    kept = {None: (*_AVERAGED, *_WEIGHTS), True: ("ema_state_dict", *_AVERAGED), False: _WEIGHTS}[ema]
    found: Any = checkpoint
    while (key := next((key for key in kept if isinstance(found.get(key), Mapping)), None)) is not None:
        found, kept = found[key], _WEIGHTS
    if ema and found is checkpoint:
        raise InputError("has no averaged weights: no ema_state_dict, state_dict_ema, model_ema or ema")
    weights = dict(_named(found, nested=found is not checkpoint))
    if not weights:
        averaged = [key for key in _AVERAGED if isinstance(checkpoint.get(key), Mapping)]
        raise InputError(f"holds no weights{f', but averaged ones under {averaged[0]}' if averaged else ''}")
    for wrapper in ("module.", "_orig_mod.", "module."):  # either may be around the other
        names = [name for name in weights if name not in _COUNTERS]
        if names and all(name.startswith(wrapper) for name in names):
            weights = {name.removeprefix(wrapper): weights[name] for name in names}
    return weights


def _named(values: Mapping, nested: bool, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            value = torch.as_tensor(value)
        if isinstance(value, torch.Tensor) or (nested and isinstance(value, Mapping)):
            if not isinstance(name, str):
                raise InputError(f"has {name!r}, a {type(name).__name__}, where the name of a tensor should be")
            yield from (
                _named(value, nested, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
            )


Filter = Callable[[dict[str, Any], nn.Module], dict[str, torch.Tensor]]


def any_prefix(convert: Filter) -> Filter:
    """Make a `checkpoint_filter_fn` take checkpoints as they are, and with any prefix: see `weights_of` and `fitted`.

    Where a licence goes with the weights, it is said.
    """

    @functools.wraps(convert)
    def checkpoint_filter_fn(checkpoint: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
        weights = weights_of(checkpoint)
        say_licence(weights)
        return fitted(weights, model, convert)

    return checkpoint_filter_fn


def fitted(weights: dict[str, torch.Tensor], model: nn.Module, convert: Filter) -> dict[str, torch.Tensor]:
    """What a family makes of weights whose names may begin with more than the model's do.

    Detectors, Lightning's modules and wrappers put `backbone.`, `model.`, `encoder.` and the like before the names. All
    that many names begin with is tried, and what gives the model most of its tensors is taken; no prefix, if nothing
    gives it more.

    Raises:
        InputError: `convert` refuses the weights.
    """
    own = {name: value.shape for name, value in model.state_dict().items()}
    heads = Counter(name[: dot.end()] for name in weights for dot in itertools.islice(re.finditer(r"\.", name), 4))
    best, most, refusal = {}, (-1, -1), None
    for prefix in ("", *(head for head, count in heads.most_common(12) if count >= 0.3 * len(own))):
        inner = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
        try:
            found = convert(inner, model)
        except InputError as error:
            refusal = refusal or error
            continue
        except Exception:  # a family may count on names that another prefix leaves without
            continue
        fit = (sum(name in found for name in own), sum(shape == _shape(found.get(name)) for name, shape in own.items()))
        if fit > most:
            best, most = found, fit
        if most == (len(own), len(own)):
            break
    if refusal is not None and most[0] < len(own):
        raise refusal
    return best


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, torch.Tensor) else None


def filter_of(name: str) -> Filter:
    """The `checkpoint_filter_fn` of a registered model's family as `fitted` takes it; without one, nothing changes."""
    module = sys.modules[timm.models.model_entrypoint(name.split(".")[0]).__module__]
    return inspect.unwrap(getattr(module, "checkpoint_filter_fn", lambda weights, model: weights))


def misfit(
    weights: dict[str, torch.Tensor],
    found: Mapping[str, Any],
    model: nn.Module,
    name: str,
    optional: str = "^$",
    strict: bool = False,
) -> str:
    """Why weights do not fit a model, as the end of a sentence that begins with where they are from; "" if they do.

    Args:
        weights: what `weights_of` gave.
        found: what `fitted` made of them for the model.
        name: the model's.
        optional: a pattern of tensors that may be lacking. Counters of batch norms may, as PyTorch has it.
        strict: whether every tensor must be one of the model's. Those of more blocks than it has never fit.
    """
    own = {key: value.shape for key, value in model.state_dict().items()}
    needed = [key for key in own if not re.search(optional, key) and not key.endswith("num_batches_tracked")]
    kinds = {re.sub(r"\d+", "#", key) for key in own}
    complaints = {
        "lacks": [key for key in needed if key not in found],
        "has in another shape": [
            f"{key} ({_sizes(found[key].shape)} and not {_sizes(own[key])})"
            for key in needed
            if key in found and found[key].shape != own[key]
        ],
        "has too many": [
            key for key in found if key not in own and (strict or ("." in key and re.sub(r"\d+", "#", key) in kinds))
        ],
    }
    what, keys = next(((what, keys) for what, keys in complaints.items() if keys), ("", []))
    if not keys:
        return ""
    if what == "has in another shape" and len(keys) <= 0.05 * len(own):
        hint = "it is of this model, but with other options, such as num_classes"
    elif what == "has too many" and not any(re.sub(r"\d+", "#", key) in kinds for key in keys):
        hint = "leave these out"
    else:
        other = nearest(weights)
        hint = "no model of terrazzo's is near it" if other is None else f"it is nearest to model '{other}'"
    return (
        f"does not fit model '{name}': compared with the model's {len(own)} tensors it {what} {len(keys)}, such as "
        f"{', '.join(keys[:3])}; {hint}"
    )


def _sizes(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "a number"


def load_strictly(model: nn.Module, checkpoint: Any, load: Callable[[Mapping[str, Any]], Any]) -> Any:
    """What `load` gives for a state dict of a registered model, or for what `fitted` makes of another checkpoint.

    Args:
        load: PyTorch's own loading, which has the last word on what fits.

    Raises:
        WeightsError: it does not fit; the message names the nearest model and the first tensors at fault.
    """
    own = model.state_dict()
    same = isinstance(checkpoint, Mapping) and checkpoint.keys() == own.keys()
    if same and all(_shape(value) in (None, own[key].shape) for key, value in checkpoint.items()):
        return load(checkpoint)
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    try:
        weights = weights_of(checkpoint)
        found = fitted(weights, model, filter_of(name) if name else lambda weights, model: weights)
    except InputError as error:
        raise WeightsError(f"the checkpoint {str(error).removeprefix('the checkpoint ')}") from error
    try:
        return load(found)
    except RuntimeError as error:
        complaint = misfit(weights, found, model, name or type(model).__name__, strict=True)
        raise WeightsError(f"the checkpoint {complaint}" if complaint else first_line(error)) from error


def nearest(weights: dict[str, torch.Tensor]) -> str | None:
    """The model of terrazzo's that has most of these tensors, in name and shape; None if none has half of them."""
    families: dict[str, list[str]] = {}
    for name, family in registered_models().items():
        families.setdefault(family, []).append(name)
    closest = max(families.values(), key=lambda names: _likeness(weights, names[0])[0])
    best = max(closest, key=lambda name: _likeness(weights, name)[1])
    return best if _likeness(weights, best)[0] >= 0.5 else None


class _Uninitialised(TorchFunctionMode):
    """Skips what changes tensors in place: to initialise tensors of the meta device takes longest, and does nothing."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name.endswith("_") and not name.endswith("__"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _likeness(weights: dict[str, torch.Tensor], name: str) -> tuple[float, float]:
    """Which share of tensors, in name and in name and shape, weights and a model have in common."""
    with _Uninitialised():
        model = timm.create_model(name, device="meta")
    try:
        found = fitted(weights, model, filter_of(name))
    except InputError:
        return 0.0, 0.0
    own = model.state_dict()
    names = sum(key in found for key in own)
    shapes = sum(_shape(found.get(key)) == value.shape for key, value in own.items())
    return names / max(len(own), len(found)), shapes / max(len(own), len(found))


def rename(state_dict: Mapping[str, torch.Tensor], pairs: Iterable[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Apply every (regular expression, replacement) to every name, in order."""
    pairs = list(pairs)
    out = {}
    for name, value in state_dict.items():
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        out[name] = value
    return out


def flatten_pointwise(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of 1x1 convolutions as the matrices that the model's linear layers have."""
    own = model.state_dict()
    for name, value in state_dict.items():
        if name in own and own[name].dim() == 2 and tuple(value.shape[2:]) == (1, 1):
            state_dict[name] = value.flatten(1)
    return state_dict


def resize_bias_tables(state_dict: dict[str, torch.Tensor], model: nn.Module, suffix: str) -> dict[str, torch.Tensor]:
    """Resize (heads, 2K - 1, 2K - 1) relative position tables to the model's kernel size, bicubically."""
    own = model.state_dict()
    for name, value in state_dict.items():
        if name.endswith(suffix) and name in own and own[name].shape[1:] != value.shape[1:]:
            size = tuple(own[name].shape[1:])
            table = F.interpolate(value[None].float(), size=size, mode="bicubic", align_corners=False)[0]
            state_dict[name] = table.to(value.dtype)
    return state_dict


def licence_notices(names: Iterable[str]) -> list[str]:
    """What is to be said of the weights of a checkpoint whose tensors are so named; nothing of most."""
    names = list(names)
    return [text for pattern, text in _LICENCES.items() if any(re.search(pattern, name) for name in names)]


def say_licence(names: Iterable[str]) -> None:
    """Put such notices where Python's warnings go, on the standard error unless logging is set up otherwise."""
    for notice in licence_notices(names):
        _logger.warning(notice)
