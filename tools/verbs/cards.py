"""`terrazzo cards`: regenerates the tables of the pages."""

import click

from terrazzo.errors import InputError
from terrazzo.tools import catalogue, results
from terrazzo.tools.reports import cards


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 if a page is stale.")
@click.option("--count", is_flag=True, help="First count every model's parameters and multiply-adds again.")
def command(check: bool, count: bool) -> int:
    """Regenerate the tables of README.md, docs/ and the model cards from the result files, and what `list` prints."""
    if not (results.ROOT / "README.md").exists():
        raise InputError("the pages are in a source checkout of terrazzo; this is an installed copy")
    if count and not check:
        for package, path in cards.COUNTS.items():
            results.write(path, cards.measure_models(package))
    stale = []
    pages = cards.pages()
    listed = catalogue.registered()
    if not catalogue.PATH.exists() or results.read(catalogue.PATH, catalogue.Entry) != listed:
        stale.append("the list of models")
        if not check:
            results.write(catalogue.PATH, listed, catalogue.Entry)
    for page in pages:
        text = page.read_text()
        new = cards.render(text, "../" * len(page.relative_to(results.ROOT).parts[1:]))
        if new != text:
            stale.append(str(page.relative_to(results.ROOT)))
            if not check:
                page.write_text(new)
    names, everything = ", ".join(stale), f"the list of models and all {len(pages)} pages"
    if check:
        click.echo(f"stale: {names}; run `terrazzo cards`" if stale else f"{everything} are up to date")
        return int(bool(stale))
    click.echo(f"rewrote {names}" if stale else f"{everything} were up to date")
    return 0
