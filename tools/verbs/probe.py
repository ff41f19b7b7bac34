"""`terrazzo probe`: what a frozen backbone's features are good for. Each kind of probe is a file of `tools/probe`."""

import importlib

import click

KINDS = {
    "binding": "Whether the features of two positions tell that both belong to one object, beside controls.",
    "field": "Which pixels a position of a map depends on, as a picture and as radii.",
    "segmentation": "A linear probe on the last map: mIoU with and without a change of the model.",
}


class _Kinds(click.Group):
    """A group that imports a kind at first use."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(KINDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in KINDS:
            return None
        return importlib.import_module(f"terrazzo.tools.probe.{name}").command

    def resolve_command(self, context: click.Context, args: list[str]):
        if args and args[0] not in KINDS and not args[0].startswith("-"):
            context.fail(f"no probe {args[0]!r}; the probes are: {', '.join(KINDS)}")
        return super().resolve_command(context, args)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """List the kinds from the table above, importing none."""
        with formatter.section("Probes"):
            formatter.write_dl(list(KINDS.items()))


@click.group(cls=_Kinds)
def command() -> None:
    """Train something small on the features of a frozen backbone, and see what the features are good for."""
