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
    "terrazzo.clips": "What mixes the frames of a clip. [The guide](../docs/clips.md) shows how.",
    "terrazzo.degradations": "Pictures made worse, to be restored. [The guide](../docs/restoration.md) shows how.",
    "terrazzo.gated_zoom": "A second look at the tiles where it pays. [The guide](../docs/zoom.md) shows how.",
    "terrazzo.spatial": "Huge images over several ranks. [The guide](../docs/spatial.md) shows how.",
    "terrazzo.errors": "What terrazzo raises on purpose.",
}
MECHANISMS = {
    "mixers": "Mechanisms in place of softmax attention; [the guide](../docs/mixers.md) shows how to use them.",
    "reducers": "Methods of `terrazzo.reduce`, beside `mctf` and `asvit`, which are families; "
    "[the guide](../docs/reducers.md) shows how to choose one.",
}
_EXPLORER = "<!-- the explorer -->"
_NO_PACKAGES = {"docs", "tests", "configs", "build", "dist", "data", "demo", "work_dirs", "exports"}


def public_names(module: str) -> dict[str, str]:
    """The public names of a package, from its source, with the place of each definition.

    They are the names of `from x import y as y`, or what the file itself defines; `__all__` decides if there is one.
    """
    path = ROOT.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text())
    found = {
        node.name: f"{module}.{node.name}" for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    listed: list[str] | None = None
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            listed = ast.literal_eval(node.value)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("terrazzo"):
            for alias in node.names:
                if not _is_module(node.module, alias.name):
                    found[alias.name] = f"{node.module}.{alias.name}"
    return {name: found[name] for name in sorted(listed or found) if not name.startswith("_") and name in found}


def mechanisms(kind: str) -> list[str]:
    """The names of the mixers or of the reducers, which are the names of their files."""
    return sorted(path.stem for path in (ROOT / "backbones" / kind).glob("[!_]*.py"))


def reference_pages() -> dict[str, str]:
    """The text of every reference page, by its place on the site."""
    pages = {}
    for module, text in REFERENCE.items():
        names = {
            name: place
            for name, place in public_names(module).items()
            if module != "terrazzo.errors" or name[0].isupper()  # its functions are for terrazzo's own use
        }
        entries = "".join(
            f'::: {place}\n    options: {{ heading: "{module}.{name}", toc_label: "{name}" }}\n\n'
            for name, place in names.items()
        )
        pages[f"reference/{module}.md"] = f"# `{module}`\n\n{text}\n\n{entries}"
    options = "    options: { members: false, heading_level: 3 }\n"
    for kind, text in MECHANISMS.items():
        place = f"terrazzo.backbones.{kind}"
        entries = "".join(
            f"## {name}\n\n::: {place}.{name}.{_class_of(kind, name)}\n{options}\n" for name in mechanisms(kind)
        )
        pages[f"reference/{place}.md"] = f"# `{place}`\n\n{text}\n\n{entries}"
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
    """Lay out the package for mkdocstrings, write out the navigation, and name headings as repositories' pages do."""
    from pymdownx.slugs import slugify

    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    shutil.rmtree(PACKAGE, ignore_errors=True)
    PACKAGE.mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.suffix == ".py" or ((path / "__init__.py").exists() and path.name not in _NO_PACKAGES):
            (PACKAGE / path.name).symlink_to(path)
    config.nav = navigation(config.nav)
    return config


def navigation(items: list) -> list:
    """The navigation with patterns replaced by the pages that no line names; what does not exist is left out."""
    named = {place for place in _leaves(items) if "*" not in place}
    return list(_expanded(items, sorted(places()), named))


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
    if _EXPLORER not in markdown:
        return markdown
    page.meta["hide"] = ["navigation", "toc"]  # the plot needs the whole width
    frame = '<iframe src="../explorer.html" title="explorer" style="width: 100%; height: 60rem; border: 0"></iframe>'
    return markdown.replace(_EXPLORER, f"[Open it in a page of its own](explorer.html)\n\n{frame}")


def _own(file) -> bool:
    """Whether a file of docs/ is among `sources`, or is no page."""
    return f"docs/{file.src_uri}" in sources() or file.src_uri.endswith(".py") or "__pycache__" in file.src_uri


def _explorer() -> str:
    from terrazzo.tools.reports.explorer import page

    return page("../model_cards/{}/")


def _leaves(items: list) -> Iterator[str]:
    for item in items:
        for value in item.values() if isinstance(item, dict) else [item]:
            yield from _leaves(value) if isinstance(value, list) else [value]


def _expanded(items: list, there: list[str], named: set[str]) -> Iterator:
    for item in items:
        title, value = next(iter(item.items())) if isinstance(item, dict) else ("", item)
        if isinstance(value, list):
            found: list | str = list(_expanded(value, there, named))
        elif "*" in value:
            found = [place for place in there if _fits(place, value) and place not in named]
        else:
            found = value if value in there else []
        if not found:
            continue
        if title:
            yield {title: found}
        else:
            yield from [found] if isinstance(found, str) else found


def _fits(place: str, pattern: str) -> bool:
    path = Path(place)
    return path.suffix == ".md" and len(path.parts) == pattern.count("/") + 1 and path.match(pattern)


def _is_module(module: str | None, name: str) -> bool:
    """Whether `from module import name` imports a module of terrazzo."""
    folder = ROOT.joinpath(*(module or "").split(".")[1:], name)
    return (folder / "__init__.py").exists() or folder.with_suffix(".py").exists()


def _class_of(kind: str, name: str) -> str:
    """The class of a mixer's or reducer's file: its first public class."""
    tree = ast.parse((ROOT / "backbones" / kind / f"{name}.py").read_text())
    return next(node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")
