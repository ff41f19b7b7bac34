"""`terrazzo explore`: the measured figures as one page with plots."""

from pathlib import Path

import click

from terrazzo.tools.options import UserPath


@click.command()
@click.option("--out", type=UserPath(), default=Path("explorer.html"), show_default=True, help="The page to write.")
def command(out: Path) -> None:
    """Write one HTML page: times, multiply-adds, parameters and activations over published accuracy, and the cards.

    The page loads nothing from the network. It has what stands in model_cards/results.
    """
    from terrazzo._files import written_whole
    from terrazzo.tools.reports import explorer

    text = explorer.page()
    with written_whole(out) as path:
        path.write_text(text, encoding="utf-8")
    click.echo(f"wrote {out}; open it in a browser")
