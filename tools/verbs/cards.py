"""`terrazzo cards`: regenerates the tables of the pages."""

import click

from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.reports import cards


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 if a page is stale.")
@click.option("--count", is_flag=True, help="First count every model's parameters and multiply-adds again.")
def command(check: bool, count: bool) -> int:
    """Regenerate the tables of README.md, docs/ and the model cards from the result files."""
    if not (results.ROOT / "README.md").exists():
        raise InputError("the pages are in a source checkout of terrazzo; this is an installed copy")
    if count and not check:
        results.write(cards.MODELS, cards.measure_models())
    stale = []
    pages = cards.pages()
    for page in pages:
        text = page.read_text()
        new = cards.render(text, "../" * len(page.relative_to(results.ROOT).parts[1:]))
        if new != text:
            stale.append(page)
            if not check:
                page.write_text(new)
    names = ", ".join(str(page.relative_to(results.ROOT)) for page in stale)
    if check:
        click.echo(f"stale: {names}; run `terrazzo cards`" if stale else f"all {len(pages)} pages are up to date")
        return int(bool(stale))
    click.echo(f"rewrote {names}" if stale else f"all {len(pages)} pages were up to date")
    return 0
