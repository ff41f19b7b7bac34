"""`terrazzo doctor`: which parts of another project work here; each subject is a module of `tools.doctor`."""

import importlib

import click

SUBJECTS = {"openmmlab": "Build every model config that OpenMMLab's installed packages ship."}


class SubjectGroup(click.Group):
    """A group that imports its subjects at first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBJECTS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in SUBJECTS:
            return None
        return importlib.import_module(f"terrazzo.tools.doctor.{name}").command

    def resolve_command(self, ctx: click.Context, args: list[str]):
        if args and args[0] not in SUBJECTS and not args[0].startswith("-"):
            ctx.fail(f"the doctor knows no {args[0]!r}; name one of: {', '.join(SUBJECTS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subjects from the table above, importing none."""
        with formatter.section("Subjects"):
            formatter.write_dl(list(SUBJECTS.items()))


@click.group(cls=SubjectGroup, invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Examine another project, and say what works here."""
    if ctx.invoked_subcommand is None:
        ctx.fail(f"name what to examine: {', '.join(SUBJECTS)}")
