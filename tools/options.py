"""Command line options that several verbs share."""

import os
from collections.abc import Callable
from pathlib import Path

import click

POSITIVE = click.FloatRange(min=0, min_open=True)
"""A number above 0, such as a time."""


class UserPath(click.Path):
    """A path as a user writes it: a leading `~` is the home folder, which a shell does not expand after `=`."""

    def __init__(self):
        super().__init__(path_type=Path)

    def convert(
        self, value: str | os.PathLike, parameter: click.Parameter | None, context: click.Context | None
    ) -> Path:
        """The path, with the home folder in full."""
        return super().convert(os.path.expanduser(value), parameter, context)


class UserPlace(click.ParamType):
    """A path, an address or a number, as text; a leading `~` is the home folder."""

    name = "place"

    def convert(self, value: str, parameter: click.Parameter | None, context: click.Context | None) -> str:
        """The text, with the home folder in full."""
        return os.path.expanduser(value)


class Overlap(click.ParamType):
    """How tiles overlap: "auto", "blend" or a number of pixels."""

    name = "overlap"

    def convert(self, value: str | int, parameter: click.Parameter | None, context: click.Context | None) -> str | int:
        """The word, or the number."""
        if isinstance(value, int) or value in ("auto", "blend"):
            return value
        if not value.isdecimal():
            self.fail(f"{value!r} is neither auto nor blend nor a number of pixels", parameter, context)
        return int(value)


def max_megapixels_option(function: Callable) -> Callable:
    """Add --max-megapixels, which holds while the verb runs."""

    def allow(context: click.Context, parameter: click.Parameter, count: float | None) -> None:
        if count is not None:
            from terrazzo._pixel_limit import allowed_megapixels

            context.with_resource(allowed_megapixels(count))

    return click.option(
        "--max-megapixels",
        type=POSITIVE,
        metavar="N",
        callback=allow,
        expose_value=False,
        help="Megapixels of the largest picture, or tile or strip of a file, that is read at once "
        "[default: 89, Pillow's limit].",
    )(function)


device_option = click.option("--device", metavar="DEVICE", help="cpu or cuda; by default the GPU if there is one.")


def weights_options(function: Callable) -> Callable:
    """Add --checkpoint and --pretrained, the weights of a timm model."""
    pretrained = click.option("--pretrained", is_flag=True, help="Download the published weights.")
    return click.option("--checkpoint", type=UserPath(), metavar="FILE", help="Weights.")(pretrained(function))


def config_options(function: Callable) -> Callable:
    """Add --data-root and --cfg-options; the verb gets `data_root` and `overrides`, a dict of dotted keys.

    `--cfg-options a=1 b=2` and `--cfg-options a=1 --cfg-options b=2` both work, as does `a=1 b=2` at the end.
    """

    def joined(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> None:
        if not values:
            return
        from terrazzo.openmmlab.config import parse_options

        context.meta.setdefault("overrides", {}).update(parse_options(values))

    def with_overrides(*args, **kwargs):
        return function(*args, overrides=click.get_current_context().meta.get("overrides", {}), **kwargs)

    with_overrides.__doc__ = function.__doc__
    with_overrides.__click_params__ = getattr(function, "__click_params__", [])
    for decorate in (
        click.argument("cfg_settings", nargs=-1, metavar="[KEY=VALUE]...", callback=joined, expose_value=False),
        click.option(
            "--cfg-options",
            multiple=True,
            metavar="KEY=VALUE ...",
            callback=joined,
            expose_value=False,
            help="Replace settings of the config, such as train_dataloader.batch_size=2.",
        ),
        click.option("--data-root", type=UserPath(), metavar="DIR", help="Replace the config's data folder."),
    ):
        with_overrides = decorate(with_overrides)
    return with_overrides
