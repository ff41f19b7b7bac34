"""What `terrazzo explain` prints: tables for the operators, sentences for the reasons, a table for the costs."""

from collections.abc import Iterable, Sequence

import click

from terrazzo.kernels.dispatch.backend import BACKENDS
from terrazzo.tools.console import human, print_table

MEBI = 1 << 20


def print_facts(facts: dict) -> None:
    """Print what `explain` found, with the model's name, input, dtype and device."""
    click.echo(f"{facts['model']}, {'x'.join(map(str, facts['input']))}, {facts['dtype']}, on {facts['device']}")
    if facts["changes"]:
        click.echo(f"changed by {' and '.join(facts['changes'])}")
    for line in mixer_lines(facts["mixers"]):
        click.echo(line)
    operators = dict.fromkeys(call["operator"] for call in facts["calls"])
    if not operators:
        click.echo(
            "The model calls no operator of terrazzo: PyTorch runs everything, and there is no backend to choose."
        )
    for operator in operators:
        click.echo()
        _print_operator(operator, [call for call in facts["calls"] if call["operator"] == operator])
    click.echo()
    _print_costs(facts)


def mixer_lines(records: Sequence[dict]) -> list[str]:
    """A sentence for each mixer and what it does, with the layers.

    Args:
        records: the calls of mixers, as `seats` gives them.
    """
    groups: dict[tuple, list[str]] = {}
    for record in records:
        does = (record["mixer"], repr(record["options"]), str(record["grid"]), record["softmax"])
        groups.setdefault(does, []).append(record["layer"])
    lines = []
    for (mixer, _, _, reason), layers in groups.items():
        grid = next(record["grid"] for record in records if record["layer"] == layers[0])
        where = "merged tokens" if grid is None else f"{grid[0]} x {grid[1]} patches"
        does = "mixes" if reason is None else f"computes softmax attention, because {reason}, on"
        lines.append(f"{mixer} {does} {where} in {ranges(layers)}")
    return lines


def _print_operator(operator: str, records: Sequence[dict]) -> None:
    click.echo(f"{operator}, {len(records)} {'call' if len(records) == 1 else 'calls'}")
    rows = [
        (
            record["layer"],
            "x".join(map(str, record["shape"].values())),
            ", ".join(record["parameters"].values()),
            record["backend"] or "none",
            f"{record['flops'] / 1e6:.1f}",
            f"{(record['bytes_read'] + record['bytes_written']) / MEBI:.2f}",
        )
        for record in records
    ]
    columns = (
        "layer",
        " x ".join(records[0]["shape"]),
        ", ".join(records[0]["parameters"]),
        "backend",
        "MFLOPs",
        "MiB",
    )
    print_table(rows, columns, right=(4, 5))
    click.echo("MFLOPs follow the definition, two for a multiply-add, whatever else a backend computes.")
    click.echo("MiB are the least that a call reads and writes: each of its inputs and outputs once.")
    for line in reasons(records):
        click.echo(line)


def reasons(records: Sequence[dict]) -> list[str]:
    """One sentence for each backend that runs, and one for each reason against another backend, with the layers.

    Args:
        records: the calls of one operator, as `explain` gives them.
    """
    order = ", ".join(BACKENDS[1:])
    chosen: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for record in records:
        if record["backend"] is None:
            line = f"{record['asked']}, asked for by {record['asked_by']}, cannot run: the model raises BackendError"
        elif record["asked"] == "auto":
            line = f"{record['backend']} runs: it is the first of {order} that is not refused"
        else:
            line = f"{record['backend']} runs: asked for by {record['asked_by']}"
        chosen.setdefault(line, []).append(record["layer"])
        for name, reason in record["refused"].items():
            refused.setdefault(f"{name} is refused: {reason}", []).append(record["layer"])
    return [
        f"{line} ({'all calls' if len(layers) == len(records) else ranges(layers)})"
        for lines in (chosen, refused)
        for line, layers in lines.items()
    ]


def ranges(names: Iterable[str]) -> str:
    """Names of layers, with consecutive numbers joined: stages.0.blocks.0-2.attn, stages.1.blocks.0.attn."""
    runs: list[list[str]] = []
    for name in dict.fromkeys(names):
        place = _counts_up(runs[-1][-1], name) if runs else None
        if place is not None and (len(runs[-1]) == 1 or place == _counts_up(*runs[-1][-2:])):
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(map(_range, runs))


def _counts_up(before: str, after: str) -> int | None:
    """The index of the only part in which two names differ, if the second's is larger by 1."""
    pairs = list(zip(before.split("."), after.split(".")))
    differing = [place for place, (a, b) in enumerate(pairs) if a != b]
    if before.count(".") != after.count(".") or len(differing) != 1:
        return None
    a, b = pairs[differing[0]]
    return differing[0] if a.isdigit() and b == str(int(a) + 1) else None


def _range(run: Sequence[str]) -> str:
    if len(run) == 1:
        return run[0]
    place = _counts_up(*run[:2])
    last = run[-1].split(".")[place]
    return ".".join(f"{part}-{last}" if i == place else part for i, part in enumerate(run[0].split(".")))


def _print_costs(facts: dict) -> None:
    keys = ("flops", "bytes_read", "bytes_written")
    total = {key: sum(cost[key] for cost in facts["costs"]) for key in keys}
    rows = [
        (
            cost["kind"],
            cost["layers"],
            f"{cost['flops'] / 1e6:.1f}" if cost["flops"] else None,
            f"{cost['bytes_read'] / MEBI:.2f}",
            f"{cost['bytes_written'] / MEBI:.2f}",
        )
        for cost in (*facts["costs"], {"kind": "total", "layers": None, **total})
    ]
    print_table(rows, ("whole model", "layers", "MFLOPs", "MiB read", "MiB written"), right=(1, 2, 3, 4))
    click.echo("MiB count each operation alone; only convolutions, matrix products and attention have FLOPs.")
    print_table(
        [
            ("multiply-adds", f"{human(facts['macs'])} ({facts['macs']:,}), two FLOPs each"),
            ("weights", f"{facts['weight_bytes'] / MEBI:.2f} MiB ({facts['params']:,} parameters)"),
            ("activations", f"{facts['activation_bytes'] / MEBI:.2f} MiB ({facts['activations']:,} elements)"),
        ]
    )
