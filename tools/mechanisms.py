"""What a user may do to a trained model to make it cheaper: `--mixer` and `--reduce`, and models that share weights.

PyTorch is imported at first use, so that the help of a verb with these options does not wait for it.
"""

import ast
import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from terrazzo.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

_OPTION = re.compile(r",(?=\w+=)")


@dataclass(frozen=True)
class Mechanism:
    """A change of a model.

    Attributes:
        name: as a user writes it: "llsa,levels=2".
        change: changes a model in place and returns it, or raises InputError.
    """

    name: str
    change: "Callable[[nn.Module], nn.Module]"

    def on(self, model: "nn.Module") -> "nn.Module":
        """A changed copy of a model, with the model's own weights; InputError if the change does not fit the model.

        Parameters that the mechanism adds are random numbers of their own seed, so that a mechanism's figures do not
        depend on what else is measured with it.
        """
        import torch

        from terrazzo.backbones._shared import shared_copy

        gpus = {p.device for p in model.parameters() if p.device.type == "cuda"}
        with self.blamed(), torch.random.fork_rng(devices=list(gpus)):
            torch.manual_seed(0)
            return self.change(shared_copy(model)).eval()

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """Inside this context, an InputError says which mechanism it is about."""
        try:
            yield
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error


DENSE = Mechanism("dense", lambda model: model)
"""No change: PyTorch's softmax attention."""


def on_meta(model: "nn.Module") -> "nn.Module":
    """A copy of a model without numbers: its forward pass computes shapes."""
    from torch import nn

    made = {id(parameter): nn.Parameter(parameter.detach().to("meta")) for parameter in model.parameters()}
    return copy.deepcopy(model, made | {id(buffer): buffer.to("meta") for buffer in model.buffers()})


def without_parameters(model: "nn.Module") -> list[str]:
    """The mixers, except "softmax", that add no parameters to a model, so that they work without training.

    Args:
        model: a model that `convert_attention` accepts; on the meta device it costs nothing.
    """
    from terrazzo.backbones._convert import convert_attention
    from terrazzo.backbones._shared import shared_copy
    from terrazzo.backbones.mixers import mixers

    count = len(list(model.parameters()))
    names = [name for name in mixers() if name != "softmax"]
    return [name for name in names if len(list(convert_attention(shared_copy(model), name).parameters())) == count]


calibrate_option = click.option(
    "--calibrate",
    "calibrated",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="COUNT",
    help="Calibrate mixers that have thresholds or budgets on this many pictures, at each size.",
)


def calibrate_if_possible(model: "nn.Module", images: "Sequence[torch.Tensor]") -> bool:
    """Calibrate a model on images (1, 3, H, W), and say whether anything of it could be calibrated at their size."""
    from terrazzo.backbones._calibrate import NotCalibratedError, calibrate

    try:
        calibrate(model, images)
    except NotCalibratedError:
        return False
    return True


def mechanism_options(function: Callable) -> Callable:
    """Add --mixer, --mixer-option and --reduce; `chosen` makes mechanisms of their values."""
    for decorate in (
        click.option(
            "--reduce",
            "reducers",
            multiple=True,
            metavar="NAME[,KEY=VALUE...]",
            help="Merge or drop tokens, such as 'mctf,r=0.35,blocks=(3,6,9)'; repeatable.",
        ),
        click.option(
            "--mixer-option",
            "settings",
            multiple=True,
            metavar="KEY=VALUE",
            help="An option of every mixer that is named; repeatable.",
        ),
        click.option(
            "--mixer",
            "names",
            multiple=True,
            metavar="NAME[,KEY=VALUE...]",
            help="Another mechanism in place of softmax attention, with options, layers=(0,1,2) or checkpoint=FILE, "
            "its trained weights; repeatable.",
        ),
    ):
        function = decorate(function)
    return function


def change_options(function: Callable) -> Callable:
    """Add the options of `mechanism_options` and --mixer-layers to a verb about one model.

    The verb gets `changes`, the mechanisms that it applies one after another (`changed`).
    """

    def with_changes(
        *args,
        names: tuple[str, ...],
        settings: tuple[str, ...],
        layers: str | None,
        reducers: tuple[str, ...],
        **kwargs,
    ):
        if layers is not None:
            settings = (*settings, _layers(layers, names))
        return function(*args, changes=chosen(names, settings, reducers), **kwargs)

    with_changes.__doc__ = function.__doc__
    with_changes.__click_params__ = getattr(function, "__click_params__", [])
    help_ = "Layers that --mixer changes, counted from 0 [default: all]."
    layers = click.option("--mixer-layers", "layers", metavar="0,1,...", help=help_)
    return mechanism_options(layers(with_changes))


def _layers(text: str, names: Sequence[str]) -> str:
    """The value of --mixer-layers as a mixer's option."""
    if not names:
        raise InputError("--mixer-layers says which layers a mixer changes; name a mixer with --mixer NAME")
    if text != "all" and not re.fullmatch(r"\d+(,\d+)*", text):
        raise InputError(f"--mixer-layers takes numbers of layers such as 0,1,5, or all, got {text!r}")
    return "layers=all" if text == "all" else f"layers=({text},)"


def changed(model: "nn.Module", changes: Sequence[Mechanism]) -> "nn.Module":
    """The model itself after all changes, in their order; InputError if a change does not fit the model."""
    for mechanism in changes:
        with mechanism.blamed():
            model = mechanism.change(model)
    return model.eval()


def refuse_changes(config: str, changes: Sequence[Mechanism]) -> None:
    """InputError if a command changes the model of a config, which says itself how its backbone changes."""
    if changes:
        raise InputError(
            f"{config} is a config: write convert=dict(mixer=...) or reduce=dict(method=...) in its backbone, and "
            "leave --mixer and --reduce out"
        )


def chosen(names: Sequence[str], settings: Sequence[str], reducers: Sequence[str]) -> list[Mechanism]:
    """The mechanisms that a command's options name, mixers first, each once.

    Args:
        names: the values of --mixer.
        settings: the values of --mixer-option.
        reducers: the values of --reduce.

    Raises:
        InputError: a text is not of the form that its option takes.
    """
    if settings and not names:
        raise InputError("--mixer-option sets an option of mixers; name a mixer with --mixer NAME")
    shared = _pairs("--mixer-option", settings, ("model", "mixer"))
    found = [_mixer(name, shared) for name in names] + [_reducer(text) for text in reducers]
    return list({mechanism.name: mechanism for mechanism in found}.values())


def of_mixer(name: str, checkpoint: str | None = None, **options: Any) -> Mechanism:
    """The mechanism that gives every attention layer, or `layers`, a mixer.

    Args:
        name: the mixer.
        checkpoint: a file of weights of the model with these mixers, such as a conversion trained; None keeps the
            model's own weights, and new weights of the mixers.
        **options: of `convert_attention`.
    """

    def convert(model: "nn.Module") -> "nn.Module":
        from terrazzo.backbones._convert import convert_attention

        if checkpoint is None:
            return convert_attention(model, name, **options)
        from terrazzo.backbones._hosts import KEPT
        from terrazzo.checkpoints.loading import load_weights
        from terrazzo.checkpoints.records import command

        cfg = model.pretrained_cfg
        base = cfg[KEPT]["base"] if KEPT in cfg else cfg["architecture"]
        # The given model may share its weights with others.
        model = convert_attention(copy.deepcopy(model), name, **options)
        load_weights(model, base, str(checkpoint), advice=command)
        return model

    file = {} if checkpoint is None else {"checkpoint": checkpoint}
    return Mechanism(_written(name, file | options), convert)


def read_mixer(option: str, text: str) -> tuple[str, dict[str, Any]]:
    """A mixer's name and options from the value NAME[,KEY=VALUE...] of a command's option.

    Raises:
        InputError: the value has another form.
    """
    name, *pairs = _OPTION.split(text)
    return name, _pairs(option, pairs, ("model", "mixer"))


def _mixer(text: str, shared: dict[str, Any]) -> Mechanism:
    name, options = read_mixer("--mixer", text)
    return of_mixer(name, **{**shared, **options})


def of_reducer(name: str, **options: Any) -> Mechanism:
    """The mechanism that merges or drops tokens by a method of `terrazzo.reduce`, with options of it."""

    def reduce_tokens(model: "nn.Module") -> "nn.Module":
        from terrazzo.backbones._reduce import reduce

        return reduce(model, name, **options)

    return Mechanism(_written(name, options), reduce_tokens)


def read_reducer(option: str, text: str) -> tuple[str, dict[str, Any]]:
    """A method's name and options from the value NAME[,KEY=VALUE...] of a command's option.

    Raises:
        InputError: the value has another form.
    """
    name, *pairs = _OPTION.split(text)
    return name, _pairs(option, pairs, ("model", "method"))


def _reducer(text: str) -> Mechanism:
    name, options = read_reducer("--reduce", text)
    return of_reducer(name, **options)


def _pairs(option: str, texts: Sequence[str], reserved: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE texts as a dictionary; a value that is no Python literal is a text."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier() or key in reserved:
            raise InputError(f"{option} takes options of the form KEY=VALUE, got {text!r}")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def _written(name: str, options: dict[str, Any]) -> str:
    return ",".join([name, *(f"{key}={value}".replace(" ", "") for key, value in options.items())])
