"""What turns the repository's pages into a site; MkDocs calls these functions (see mkdocs.yml).

Every page has the place on the site that its file has in the repository, so that one relative link serves both. Three
things are made here: the reference pages, from the public names of the packages; the explorer; and notebooks as pages.
"""

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/*.md", "model_cards/*.md")
OPERATORS = "kernels/*/README.md"
BESIDE = ("LICENSE", "CITATION.cff", "docs/pictures/*.png", "docs/notebooks/*.ipynb")
PACKAGE = ROOT / ".cache" / "site" / "terrazzo"
"""The package under its name, without what else lies in the checkout; mkdocstrings reads the sources there."""

REFERENCE = {
    "terrazzo": "The names of `import terrazzo`.",
    "terrazzo.kernels": "The operators. [The overview](../docs/operators.md) says what each computes.",
    "terrazzo.necks": "What stands between a backbone and a head, where mmdet and mmseg have nothing.",
    "terrazzo.openmmlab": "What a config names after `custom_imports`. [The guide](../docs/openmmlab.md) shows how.",
    "terrazzo.errors": "What terrazzo raises on purpose.",
}
_NO_PACKAGES = {"docs", "tests", "configs", "build", "dist", "data", "demo", "work_dirs", "exports"}


def public_names(module: str) -> list[str]:
    """The public names of a package: `from x import y as y`, or what the file itself defines; from the source."""
    path = ROOT.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text())
    listed = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    ]
    if listed:
        return sorted(listed[0])
    imported = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name == alias.asname and not _is_module(node.module, alias.name)
    ]
    own = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return sorted(name for name in {*imported, *own} if not name.startswith("_"))


def mixers() -> list[str]:
    """The names of the mixers, which are the names of their files."""
    return sorted(path.stem for path in (ROOT / "backbones" / "mixers").glob("[!_]*.py"))


def reference_pages() -> dict[str, str]:
    """The text of every reference page, by its place on the site."""
    pages = {}
    for module, text in REFERENCE.items():
        entries = "".join(f"::: {module}.{name}\n\n" for name in public_names(module))
        pages[f"reference/{module}.md"] = f"# `{module}`\n\n{text}\n\n{entries}"
    options = "    options: { members: false, heading_level: 3 }\n"
    entries = "".join(
        f"## {name}\n\n::: terrazzo.backbones.mixers.{name}.{_mixer_class(name)}\n{options}\n" for name in mixers()
    )
    text = "Mechanisms in place of softmax attention; [the guide](../docs/mixers.md) shows how to use them."
    pages["reference/terrazzo.backbones.mixers.md"] = f"# `terrazzo.backbones.mixers`\n\n{text}\n\n{entries}"
    return pages


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its texts and its code, without outputs."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
    title, rest = parts[0].split("\n", 1)
    return "\n\n".join([title, f"[The notebook as a file]({path.name})", rest.strip(), *parts[1:]]) + "\n"


def sources() -> dict[str, Path]:
    """The files of the repository that belong to the site, by their place in both."""
    patterns = (*PAGES, OPERATORS, *BESIDE)
    return {path.relative_to(ROOT).as_posix(): path for pattern in patterns for path in sorted(ROOT.glob(pattern))}


def places() -> list[str]:
    """The place of every file of the site."""
    notebooks = [f"docs/notebooks/{path.stem}.md" for path in sorted(ROOT.glob("docs/notebooks/*.ipynb"))]
    return [*sources(), *notebooks, *reference_pages(), "docs/explorer.html"]


def on_config(config):
    """Lay out the package for mkdocstrings, and write out the patterns of the navigation."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    PACKAGE.mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.suffix == ".py" or ((path / "__init__.py").exists() and path.name not in _NO_PACKAGES):
            (PACKAGE / path.name).symlink_to(path)
    named: set[str] = set()
    config.nav = list(_expanded(config.nav, sorted(places()), named))
    return config


def on_files(files, config):
    """Replace the files of docs/ by all files of the site."""
    from mkdocs.structure.files import File, Files

    made = reference_pages() | {
        f"docs/notebooks/{path.stem}.md": notebook_page(path) for path in ROOT.glob("docs/notebooks/*.ipynb")
    }
    made["docs/explorer.html"] = _explorer()
    return Files(
        [File.generated(config, place, abs_src_path=str(path)) for place, path in sources().items()]
        + [File.generated(config, place, content=text) for place, text in made.items()]
        + [file for file in files if not file.src_uri.startswith(("pictures/", "notebooks/")) and not _own(file)]
    )


def on_page_markdown(markdown, page, config, files):
    """Put the explorer into its page: the repository's own page has only a comment there, because it shows no HTML."""
    return markdown.replace(
        "<!-- the explorer -->",
        "[Open it in a page of its own](explorer.html)\n\n"
        '<iframe src="../explorer.html" title="explorer" style="width: 100%; height: 60rem; border: 0"></iframe>',
    )


def _own(file) -> bool:
    """Whether a file of docs/ is among `sources`, or is no page."""
    return f"docs/{file.src_uri}" in sources() or file.src_uri.endswith(".py") or "__pycache__" in file.src_uri


def _explorer() -> str:
    from terrazzo.tools.reports.explorer import page

    return page("../model_cards/{}/")


def _expanded(items: list, there: list[str], named: set[str]) -> Iterator:
    """The navigation with patterns replaced; what does not exist is left out."""
    for item in items:
        if isinstance(item, dict):
            ((title, value),) = item.items()
            if isinstance(value, list):
                yield {title: list(_expanded(value, there, named))}
            else:
                found = list(_matching(value, there, named))
                if "*" in value:
                    yield from [{title: found}] if found else []
                else:
                    yield from ({title: place} for place in found)
        else:
            yield from _matching(item, there, named)


def _matching(pattern: str, there: list[str], named: set[str]) -> Iterator[str]:
    for place in there:
        path = Path(place)
        as_deep = len(path.parts) == pattern.count("/") + 1
        if path.suffix == ".md" and as_deep and path.match(pattern) and place not in named:
            named.add(place)
            yield place


def _is_module(module: str | None, name: str) -> bool:
    """Whether `from module import name` imports a module of terrazzo."""
    folder = ROOT.joinpath(*(module or "").split(".")[1:], name)
    return (folder / "__init__.py").exists() or folder.with_suffix(".py").exists()


def _mixer_class(name: str) -> str:
    """The class of a mixer's file: its first public class."""
    tree = ast.parse((ROOT / "backbones" / "mixers" / f"{name}.py").read_text())
    return next(node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")
