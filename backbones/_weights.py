"""Loading of checkpoints: unwrapping, renaming and resizing for `checkpoint_filter_fn`, and notices of licences."""

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

from terrazzo.backbones._names import EVERY_MODEL, registered_models
from terrazzo.errors import InputError, WeightsError, first_line

RECONSTRUCTED = "reconstructed from the paper; no official weights are public"
"""The notice of a family without published code and weights, in its docstring, configuration and card."""

_LICENCES = {
    r"levels\.\d+\.blocks\.\d+\.mixer\.A_log": (
        "MambaVision's weights, by NVIDIA, are licensed CC-BY-NC-SA-4.0: no commercial use, and derived weights must "
        "have the same licence"
    ),
}
"""Licence notices, by a tensor name that only the authors' checkpoints have."""

_logger = logging.getLogger(__name__)

_AVERAGED = ("state_dict_ema", "model_ema", "ema", "params_ema")
"""Keys under which training programs keep averaged weights. mmengine's `ema_state_dict` is not among them: in its
checkpoints `state_dict` has the average, and `ema_state_dict` the weights before averaging."""

_WEIGHTS = ("state_dict", "model", "module", "model_state_dict", "net", "network", "weights", "params")

MIXER = ".attn.mixer."
"""A part of the names of parameters that `convert_attention` adds."""

LAST_PROJECTION = (r"\.out_proj\.", ".proj_out.")
"""From the name of a mixer's last projection in the authors' files, and in earlier versions, to today's name.

transformers' DETR, RT-DETR and D-FINE rename each `out_proj` of a file, in the backbone, too, and lose its weights.
"""

_COUNTERS = ("steps", "n_averaged")
"""Names of tensors in which an average counts its updates."""


def weights_of(checkpoint: Any, ema: bool | None = None) -> dict[str, torch.Tensor]:
    """The named tensors of a checkpoint, wherever a training program put them. Only this function knows the places.

    Tensors may be under `state_dict`, `model` or another usual key, also nested. Names in nested dicts are joined by
    dots, NumPy arrays become tensors, and other values are left out. The prefixes `module.` and `_orig_mod.`, which
    DistributedDataParallel and torch.compile put before every name, are removed.

    Args:
        checkpoint: the content of a file.
        ema: True for the weights that EMA set aside, False for the other weights, None for averaged weights if there
            are any.

    Raises:
        InputError: there are no weights; the message is the end of a sentence that begins with the file.
    """
    if not isinstance(checkpoint, Mapping):
        raise InputError(f"holds a {type(checkpoint).__name__}, and weights are a dict of names and tensors")
    kept = {None: (*_AVERAGED, *_WEIGHTS), True: ("ema_state_dict", *_AVERAGED), False: _WEIGHTS}[ema]
    found: Any = checkpoint
    while (key := next((key for key in kept if isinstance(found.get(key), Mapping)), None)) is not None:
        found, kept = found[key], _WEIGHTS
    if ema and found is checkpoint:
        raise InputError("has no averaged weights: no ema_state_dict, state_dict_ema, model_ema, ema or params_ema")
    weights = dict(_named(found, nested=found is not checkpoint))
    if not weights:
        averaged = [key for key in _AVERAGED if isinstance(checkpoint.get(key), Mapping)]
        raise InputError(f"holds no weights{f', but averaged weights under {averaged[0]}' if averaged else ''}")
    for wrapper in ("module.", "_orig_mod.", "module."):  # the wrappers may be nested in either order
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
    """Make a `checkpoint_filter_fn` take unmodified checkpoints, with any prefix: see `weights_of` and `fitted`.

    Weights with a restrictive licence cause a notice.
    """

    @functools.wraps(convert)
    def checkpoint_filter_fn(checkpoint: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
        weights = weights_of(checkpoint)
        say_licence(weights)
        return fitted(weights, model, convert)

    return checkpoint_filter_fn


def fitted(weights: dict[str, torch.Tensor], model: nn.Module, convert: Filter) -> dict[str, torch.Tensor]:
    """Convert weights for a model; their names may have an additional prefix.

    Detectors, Lightning's modules and wrappers put `backbone.`, `model.`, `encoder.` and the like before the names.
    Prefixes that many names share are tried, and the prefix that gives the model the most tensors is taken; no prefix,
    if it gives as many.

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
        except Exception:  # a family may need names that are missing under this prefix
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
    """The `checkpoint_filter_fn` of a registered model's family, for `fitted`; the identity if the family has none."""
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
    """Why weights do not fit a model, as the end of a sentence that begins with their source; "" if they fit.

    Args:
        weights: the output of `weights_of`.
        found: the output of `fitted` for these weights and the model.
        name: name of the model.
        optional: a pattern of tensors that may be missing. Counters of batch norms may always be missing.
        strict: whether every tensor must be one of the model's. Tensors of surplus blocks never fit.
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
        hint = "no terrazzo model is similar" if other is None else f"it is nearest to model '{other}'"
    if any(MIXER in key for key in weights) and not any(MIXER in key for key in own):
        hint += (
            "; it has parameters of mixers and the model has none: convert the model first with --mixer NAME, "
            "convert=dict(mixer=NAME) or terrazzo.convert_attention, or build mixer_vit_tiny with mixer=NAME"
        )
    return (
        f"does not fit model '{name}': compared with the model's {len(own)} tensors it {what} {len(keys)}, such as "
        f"{', '.join(keys[:3])}; {hint}"
    )


def _sizes(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "a number"


def load_strictly(model: nn.Module, checkpoint: Any, load: Callable[[Mapping[str, Any]], Any]) -> Any:
    """Load a state dict of a registered model, or another checkpoint that `fitted` converts first.

    Args:
        load: PyTorch's loading, which finally decides what fits. Its result is returned.

    Raises:
        WeightsError: the checkpoint does not fit; the message names the nearest model and the first wrong tensors.
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
        # PyTorch itself ignores the parameters of a mixer where a layer has none.
        lost = next((key for key in found if MIXER in key and key not in own), None)
        if lost is not None:
            raise RuntimeError(f"unexpected {lost}")
        return load(found)
    except RuntimeError as error:
        complaint = misfit(weights, found, model, name or type(model).__name__, strict=True)
        raise WeightsError(f"the checkpoint {complaint}" if complaint else first_line(error)) from error


def nearest(weights: dict[str, torch.Tensor]) -> str | None:
    """The terrazzo model that has the most of these tensors, by name and shape; None if no model has half of them."""
    families: dict[str, list[str]] = {}
    for name, family in registered_models(EVERY_MODEL).items():
        families.setdefault(family, []).append(name)
    closest = max(families.values(), key=lambda names: _likeness(weights, names[0])[0])
    best = max(closest, key=lambda name: _likeness(weights, name)[1])
    return best if _likeness(weights, best)[0] >= 0.5 else None


class _Uninitialised(TorchFunctionMode):
    """Skips in-place operations: initialising tensors on the meta device takes most of the time and does nothing."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name.endswith("_") and not name.endswith("__"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _likeness(weights: dict[str, torch.Tensor], name: str) -> tuple[float, float]:
    """The shares of tensors that weights and a model have in common, by name, and by name and shape."""
    with _Uninitialised():
        model = timm.create_model(name, device="meta")
    try:
        found = fitted(weights, model, filter_of(name))
    except InputError:
        return 0.0, 0.0
    own = model.state_dict()
    names = sum(key in found for key in own)
    shapes = sum(_shape(found.get(key)) == value.shape for key, value in own.items())
    count = max(len(own), len(found), len(weights))  # a filter may drop what it does not know
    return names / count, shapes / count


def take_old_names(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *args) -> None:
    """A load hook of a mixer: files of earlier versions have `out_proj` where the mixer has `proj_out`."""
    for name in [name for name in state if name.startswith(f"{prefix}out_proj.")]:
        state[f"{prefix}proj_out.{name.rsplit('.', 1)[-1]}"] = state.pop(name)


def current_names(state: Mapping[str, Any], own: Iterable[str]) -> dict[str, Any]:
    """A state dict of an earlier version, with the names of `own`."""
    own = set(own)
    renamed = {name: re.sub(*LAST_PROJECTION, name) for name in state if name not in own}
    return {renamed[name] if renamed.get(name) in own else name: value for name, value in state.items()}


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
    """Turn weights of 1x1 convolutions into matrices if the model has linear layers there."""
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
    """Licence notices for a checkpoint with these tensor names; most checkpoints have no notice."""
    names = list(names)
    return [text for pattern, text in _LICENCES.items() if any(re.search(pattern, name) for name in names)]


def say_licence(names: Iterable[str]) -> None:
    """Log the licence notices as warnings; Python prints them to standard error unless logging is configured."""
    for notice in licence_notices(names):
        _logger.warning(notice)
