"""`terrazzo bench`: speed of an operator, a family's backbone, or its runtimes, as ratios to named peers of one run."""

import importlib
from collections.abc import Iterable
from pathlib import Path

import click

from terrazzo.errors import InputError
from terrazzo.tools.bench.registry import BENCHMARKS, KINDS, module_of
from terrazzo.tools.options import POSITIVE, device_option

_PASSES = {"forward": ("forward",), "training": ("forward+backward",), "both": ("forward", "forward+backward")}


_SECONDS = {"cuda": 0.3}


_COMMANDS = {
    **{"reduce": "reduction", "mixers": "mixers", "scaling": "scaling", "tiled": "tiled"},
    **{"length": "length.benchmark", "lra": "lra.benchmark"},
}
"""Benchmarks of models that a user names, and their modules in `terrazzo.tools.bench`."""


class _Benchmarks(click.Command):
    """Benchmarks of a user's model take other arguments than benchmarks against peers: they are separate commands."""

    def make_context(self, info_name: str | None, args: list[str], *more, **extra) -> click.Context:
        if not args or args[0] not in _COMMANDS:
            return super().make_context(info_name, args, *more, **extra)
        command = importlib.import_module(f"terrazzo.tools.bench.{_COMMANDS[args[0]]}").command
        return command.make_context(f"{info_name} {args[0]}", args[1:], *more, **extra)

    def invoke(self, context: click.Context) -> None:
        super().invoke(context) if context.command is self else context.command.invoke(context)


def _list(context: click.Context, parameter: click.Parameter, kind: str | None) -> None:
    """Print the names of a kind, one per line, and leave."""
    if kind is None:
        return
    for name in BENCHMARKS if kind == "all" else KINDS[kind]:
        click.echo(name)
    context.exit()


@click.command(cls=_Benchmarks)
@click.argument("name")
@click.option(
    "--list",
    type=click.Choice([*KINDS, "all"]),
    is_flag=False,
    flag_value="all",
    is_eager=True,
    expose_value=False,
    callback=_list,
    help="Print the names of the benchmarks, all or those of a kind, and leave.",
)
@device_option
@click.option(
    "--seconds",
    type=POSITIVE,
    help="Time for each figure; by default 2, and 0.3 on a GPU.",
)
@click.option("--pass", "passes", type=click.Choice(list(_PASSES)), help="Operators: both; backbones: forward.")
@click.option(
    "--compile/--no-compile",
    "compiled",
    default=None,
    help="Also measure compiled forms; by default on a GPU, and among runtimes.",
)
@click.option("--quick", is_flag=True, help="Fewer shapes.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows as CSV, after every shape."
)
@click.option("--resume", is_flag=True, help="Keep the rows in --out, and measure only the missing rows.")
def command(
    name: str,
    device: str | None,
    seconds: float | None,
    passes: str | None,
    compiled: bool | None,
    quick: bool,
    out: Path | None,
    resume: bool,
) -> None:
    """Measure the operator or family NAME against its peers on this machine, or a family's runtimes as FAMILY_runtimes.

    `terrazzo bench reduce MODEL` measures what a plain timm ViT gains and loses by fewer tokens, and `terrazzo bench
    mixers MODEL` what it gains and loses by other mixers. `terrazzo bench scaling` measures how the time of models
    grows with the image, `terrazzo bench tiled` what a huge image needs by parts of its rows, and `terrazzo bench
    length` how time and memory grow with the number of tokens. `terrazzo bench lra TASK` trains every mixer on a task
    of Long Range Arena. See their --help.
    """
    module = module_of(name)
    if out is not None and not out.parent.is_dir():
        raise InputError(f"{out.parent} is not a folder, so {out.name} cannot be written there")
    if resume and out is None:
        raise InputError("--resume continues the file that --out names; give --out FILE")
    from terrazzo.tools import results
    from terrazzo.tools.console import print_table
    from terrazzo.tools.inspect.timing import Plan
    from terrazzo.tools.targets import pick_device

    where = pick_device(device)
    plan = Plan(
        where,
        seconds if seconds is not None else _SECONDS.get(where.type, 2.0),
        _PASSES[passes] if passes else (),
        compiled,
        quick,
    )
    rows = _kept(out, where, results) if resume and out.exists() else []
    cases = [case for case in module.cases(name, plan) if not any(map(case.holds, rows))]
    reasons: dict[str, list[str]] = {}
    with click.progressbar(cases, label=name, item_show_func=lambda case: None if case is None else str(case)) as bar:
        for case in bar:
            found, wanting = module.measure(case, plan)
            rows += found
            for peer, reason in wanting.items():
                reasons.setdefault(reason, []).append(f"{peer}, {case}")
            if out is not None:
                results.write(out, rows)
    if rows:
        head, lines = module.table(rows)
        print_table(lines, head, right=tuple(range(2, len(head))))
        click.echo(f"{rows[0].device}; {rows[0].versions}; median times, measured in turns")
    _explain(reasons)
    for line in module.verdicts(rows, where.type) if rows else []:
        click.echo(line)
    if out is not None:
        click.echo(f"wrote {out}")


def _kept(out: Path, device, results) -> list:
    """The rows of a run that was interrupted. InputError if they were measured elsewhere or with other code."""
    rows = results.read(out)
    now = results.device_name(device), results.commit()
    for row in rows:
        if (row.device, row.commit) != now:
            raise InputError(
                f"{out} holds rows from {row.device} at commit {row.commit or 'none'}, but this is {now[0]} at commit "
                f"{now[1] or 'none'}; name another file, or leave --resume out"
            )
    return rows


def _explain(reasons: dict[str, Iterable[str]]) -> None:
    """A line for each reason why something was not run."""
    for reason, where in reasons.items():
        first, *others = where
        more = f" and {len(others)} more" if others else ""
        click.echo(f"not run: {first}{more}: {reason}")
