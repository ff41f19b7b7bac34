"""The `terrazzo` command: its verbs, and how an error becomes one line.

A verb is a module of `terrazzo.tools.verbs` with a click command named `command`. It is imported when it runs or when
its help is asked for. `terrazzo --help` and `terrazzo list` import neither PyTorch nor timm.
"""

import functools
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence

import click

from terrazzo import TerrazzoError, __version__
from terrazzo.errors import PictureWarning, install_command, own_text
from terrazzo.tools import interrupts
from terrazzo.tools.interrupts import Interrupted, LeaveAtOnce, end_children, terminable

VERBS = {
    "list": "Name the models, with parameters, and published accuracy or scale.",
    "info": "Describe one model: cost, pyramid, weights.",
    "explain": "Say what each operator of a model runs on, why, and what it costs.",
    "train": "Train what an OpenMMLab config describes.",
    "test": "Evaluate a checkpoint with its config.",
    "infer": "Run a classifier, segmentor, detector or restorer on pictures and videos.",
    "export": "Write a classifier, segmentor, detector or restorer as ONNX, checked against PyTorch.",
    "convert": "Write the weights of a checkpoint as safetensors.",
    "floors": "Make up pictures of terrazzo floors with labels, to try the commands on.",
    "paths": "Make up images of paths to follow, with label maps or with answers.",
    "demo": "Train, evaluate, draw and export a small segmentor in minutes.",
    "probe": "Say what a frozen backbone's features know, and how far it looks.",
    "zoom": "Say what a second look at some tiles could gain on a data set.",
    "bench": "Measure operators and backbones here, as ratios to named peers.",
    "compare": "Train backbones under one recipe, and compare them.",
    "doctor": "Build every model config of OpenMMLab's installed packages; say which cannot be built, and why.",
    "explore": "Write the measured figures as one page with plots.",
    "cards": "Regenerate the tables of the model cards.",
}

MODULES = {"list": "listing", "test": "evaluate"}
"""Verbs with modules of another name: `list` is a built-in type, and pytest would collect `test`."""

EXTRAS = {
    "mmengine": "openmmlab",
    "mmcv": "openmmlab",
    "mmdet": "openmmlab",
    "mmseg": "openmmlab",
    "pycocotools": "openmmlab",
    "torchmetrics": "openmmlab",
    "scipy": "openmmlab",
    "matplotlib": "openmmlab",
    "cv2": "video",
    "rasterio": "huge",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
}

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


def error_line(error: BaseException) -> str | None:
    """The one line that says what a user can do about `error`; None if the error is a bug in terrazzo."""
    if isinstance(error, click.ClickException):
        text = error.format_message()
    elif isinstance(error, TerrazzoError):
        text = own_text(error)
    elif isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in EXTRAS:
        package = error.name.split(".")[0]
        text = f"the package {package} is not installed; install it with: {install_command(EXTRAS[package])}"
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{os.fspath(error.filename)!s}: {error.strerror or error}"
    else:
        return None
    return " ".join(f"error: {text}".split())


def _show(others: Callable, message: Warning | str, category: type[Warning], *place: object) -> None:
    """Show a warning of terrazzo as one line on stderr, without its place in the code; show others as usual."""
    if issubclass(category, PictureWarning):
        click.echo(f"note: {message}", err=True)
    else:
        others(message, category, *place)


class VerbGroup(click.Group):
    """A group that imports its verbs at first use, and prints errors as one line on stderr."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        return importlib.import_module(f"terrazzo.tools.verbs.{MODULES.get(name, name)}").command

    def resolve_command(self, ctx: click.Context, args: list[str]):
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            ctx.fail(f"no verb {args[0]!r}; the verbs are: {', '.join(VERBS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context):
        """Run a verb; for an interrupt, click would print an extra empty line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise Interrupted(interrupt) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs from the table above, importing none."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra):
        """Run a verb and leave with its exit code.

        It is 0, 1 for a failed check, 2 for an error, 130 for Ctrl-C, and 143 for SIGTERM.
        """
        traceback = os.environ.get("TERRAZZO_TRACEBACK") == "1"
        extra["standalone_mode"] = False
        with warnings.catch_warnings(), terminable():
            if not sys.warnoptions:
                # A user can do nothing about the deprecations inside mmengine, mmdet, mmseg or torch's exporter.
                warnings.simplefilter("ignore")
                warnings.simplefilter("always", PictureWarning)
                warnings.showwarning = functools.partial(_show, warnings.showwarning)
            try:
                code = super().main(args, prog_name or "terrazzo", **extra)
            except Interrupted as interrupted:
                end_children()
                click.echo(str(interrupted), err=True)
                raise LeaveAtOnce(interrupted.exit_code) from None
            except click.Abort:
                click.echo("interrupted", err=True)
                sys.exit(EXIT_INTERRUPTED)
            except Exception as error:
                line = error_line(error)
                if line is None or (traceback and not isinstance(error, click.ClickException)):
                    raise
                click.echo(line, err=True)
                sys.exit(EXIT_ERROR)
        sys.exit(code if isinstance(code, int) else 0)


@click.group(
    "terrazzo",
    cls=VerbGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
    epilog="Set TERRAZZO_TRACEBACK=1 to see where an error came from.",
)
@click.version_option(__version__, prog_name="terrazzo")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Sub-quadratic vision backbones for dense prediction: look, train, test, run, export."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may hold anything
    interrupts.run(cli.main)
