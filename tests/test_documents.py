"""The pages that people read: links lead somewhere, code blocks run, commands parse, and README stays short."""

import functools
import html.parser
import importlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import urllib.parse
from pathlib import Path

import click
import pytest
import timm
import torch
import yaml
from click.testing import CliRunner

from terrazzo.tools import cli, results
from terrazzo.tools.data.floors import write_floors
from terrazzo.tools.reports import cards

ROOT = results.ROOT
OPERATORS = sorted(ROOT.glob("kernels/*/README.md"))
PAGES = [*cards.pages(), *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")), *OPERATORS]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN_DATA = ROOT / "docs" / "train-your-own.md"
LONG = ("export.md", "inference.md", "mixers.md", "timm.md")
"""Pages whose code takes more than seconds."""
ELSEWHERE = ("ecosystem.md",)
"""Pages whose code needs other frameworks; tests/ecosystem runs it."""

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    return [text for kind, text in _BLOCK.findall(page.read_text()) if kind == language]


@functools.cache
def anchors(page):
    """The anchors of a page's headings, as repositories' pages name them."""
    headings = re.findall(r"^#+ (.+)$", _BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def load_hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    missing = []
    for link in _LINK.findall(_BLOCK.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" not in link and (not target.exists() or (anchor and anchor not in anchors(target))):
            missing.append(link)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_merge_was_left_half_done(page):
    assert not re.search(r"^(<{7} |={7}$|>{7} )", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lists_are_lists_on_the_site(page):
    """The site's Markdown wants an empty line before a list, and four spaces before a list in a list."""
    lines = _BLOCK.sub("", page.read_text()).splitlines()
    item = re.compile(r"(\s*)(?:[-*]|\d+\.) \S")
    for before, line in itertools.pairwise(lines):
        if found := item.match(line):
            assert len(found[1]) % 4 == 0, line
            assert not before or before.startswith(" ") or item.match(before), line


def test_the_way_of_a_tensor_names_what_exists():
    """The packages contain each file, and each word in `code`, that the page names."""
    page = ROOT / "docs" / "the-way-of-a-tensor.md"
    packages = ("backbones", "kernels", "openmmlab", "tools")
    files = [path for folder in packages for path in (ROOT / folder).rglob("*.py")]
    files += ROOT.glob("*.py")
    paths = "\n".join(f"/{path.relative_to(ROOT)}" for path in files)
    words = {word for path in files for word in re.findall(r"\w+", f"{path.stem} {path.read_text()}")}
    for text in re.findall(r"`([^`\n]+)`", page.read_text()):
        if text.endswith((".py", "/")):
            assert text in paths, text
        assert set(re.findall(r"[A-Za-z_]{3,}", text.removesuffix(".py"))) <= words, text


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def module_of(verb):
    return importlib.import_module(f"terrazzo.tools.verbs.{cli.MODULES.get(verb, verb)}")


def code_pages():
    for page in GUIDES:
        if page.name not in ELSEWHERE and any("_base_" not in block for block in blocks(page, "python")):
            marks = [pytest.mark.slow] if page.name in LONG else []
            yield pytest.param(page, marks=marks, id=name_of(page))


def prepare(page):
    """Write the files that the code of a page reads, and that commands of the page or of README.md make."""
    if page.name == "export.md":
        pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
        (words,) = (words for words in commands(page) if words[1] == "s2aformer_mini")
        assert CliRunner().invoke(module_of("export").command, words[1:], standalone_mode=False).exception is None
    if page.name == "inference.md":
        pytest.importorskip("mmseg", reason="needs the extra 'openmmlab'")
        from mmseg.registry import MODELS

        from terrazzo.openmmlab.config import load_config

        write_floors("data/floors", train=1, val=1, size=64)
        model = MODELS.build(load_config("fpn_dinat-mini_floors").model)
        Path("work_dirs/floors").mkdir(parents=True)
        torch.save({"state_dict": model.state_dict(), "meta": {}}, "work_dirs/floors/iter_40.pth")


@pytest.mark.long
@pytest.mark.parametrize("page", code_pages())
def test_code_runs(page, tmp_path, monkeypatch):
    """The Python blocks of a page, one after another, without downloads; configs are tested otherwise."""
    monkeypatch.chdir(tmp_path)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    prepare(page)
    space = {}
    for index, block in enumerate(blocks(page, "python")):
        if "_base_" not in block:
            exec(compile(block, f"{page.name}, block {index}", "exec"), space)


def commands(page):
    """The command lines of a page that call terrazzo."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for name in ("terrazzo", "-m"):  # `python -m terrazzo`, `torchrun ... -m terrazzo`
                if name in words:
                    rest = words[words.index(name) + 1 :]
                    yield rest[1:] if rest[:1] == ["terrazzo"] else rest
                    break


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_commands_parse(page):
    """Every verb and every option in the pages exists."""
    for words in commands(page):
        verb, *rest = words
        assert verb in cli.VERBS, words
        module = module_of(verb)
        command = module.command
        if verb == "bench" and rest[0] in module._COMMANDS:
            command = importlib.import_module(f"terrazzo.tools.bench.{module._COMMANDS[rest.pop(0)]}").command
        elif isinstance(command, click.Group):
            command = command.get_command(click.Context(command), rest.pop(0))
        command.make_parser(click.Context(command, info_name=verb)).parse_args(rest)


def configs():
    """The configs that the page on own data writes, by file name."""
    found = [(block.split("\n", 1)[0], block) for block in blocks(OWN_DATA, "python")]
    return {line.removeprefix("# "): block for line, block in found if line.endswith(".py")}


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """A folder with the configs of the page, and data."""
    monkeypatch.chdir(tmp_path)
    write_floors("data/stones", train=8, val=6, size=96)
    for name, text in configs().items():
        Path(name).write_text(text)
    return tmp_path


@pytest.mark.long
def test_configs_for_own_data_fit_the_data(own_data):
    pytest.importorskip("mmdet", reason="needs the extra 'openmmlab'")
    from terrazzo.openmmlab.config import load_config
    from terrazzo.tools.data.checks import check_data

    assert len(configs()) == 4
    for name in configs():
        cfg = load_config(name)
        check_data(cfg, ("train", "val", "test"))
        counts = re.findall(r"'num_classes': (\d+)", str(cfg.model.to_dict()))
        assert {int(count) for count in counts} == {len(cfg.metainfo["classes"])}, name


@pytest.mark.slow
def test_commands_for_own_data_run(own_data):
    """The commands of the page, one after another; the training with masks takes minutes and is left out."""
    pytest.importorskip("mmdet", reason="needs the extra 'openmmlab'")
    pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    for verb, *rest in commands(OWN_DATA):
        if verb != "floors" and rest[0] != "stones_masks.py":
            done = CliRunner().invoke(module_of(verb).command, rest, standalone_mode=False)
            assert done.exception is None, (verb, rest, done.output[-2000:])
            assert done.return_value in (None, 0), (verb, rest, done.output[-2000:])


class TestSite:
    @pytest.fixture(scope="class")
    def hooks(self):
        return load_hooks()

    def test_every_public_name_has_an_entry(self, hooks):
        """The names are read from the sources; they are those that Python sees."""
        import terrazzo.errors
        import terrazzo.kernels

        known = {module: set(hooks.public_names(module)) for module in hooks.REFERENCE}
        assert known["terrazzo.kernels"] == set(terrazzo.kernels.__all__)
        own = {name for name in dir(terrazzo) if not name.startswith("_")}
        values = {name: getattr(terrazzo, name) for name in own}
        functions = {
            name for name, value in values.items() if str(getattr(value, "__module__", "")).startswith("terrazzo")
        }
        assert known["terrazzo"] == functions
        for module in ("terrazzo.necks", "terrazzo.openmmlab"):
            if importlib.util.find_spec("mmengine"):
                assert known[module] == set(importlib.import_module(module).__all__)
        pages = hooks.reference_pages()
        for module, names in known.items():
            text = pages[f"reference/{module}.md"]
            for name in names:
                if module != "terrazzo.errors" or name[0].isupper():
                    assert f'heading: "{module}.{name}"' in text
        assert all(f"## {name}\n" in pages["reference/terrazzo.backbones.mixers.md"] for name in terrazzo.mixers())
        assert "terrazzo.backbones.reducers.evit.EViT\n" in pages["reference/terrazzo.backbones.reducers.md"]

    def test_mypy_checks_every_module_of_a_public_name(self, hooks):
        text = (ROOT / "pyproject.toml").read_text().partition("[tool.mypy]")[2].partition("]\n")[2]
        checked = set(re.findall(r'^    "(terrazzo[\w.]*)",$', text.partition("\n]")[0], re.MULTILINE))
        places = {
            place.rpartition(".")[0] for module in hooks.REFERENCE for place in hooks.public_names(module).values()
        }
        assert places <= checked

    def test_every_page_is_in_the_navigation(self, hooks):
        items = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
        named = list(hooks._leaves(hooks.navigation(items)))
        assert sorted(named) == sorted(place for place in hooks.places() if place.endswith(".md"))

    def test_what_does_not_exist_is_left_out(self, hooks):
        assert hooks.navigation(["README.md", "docs/none.md", {"Nothing": ["none/*.md"]}]) == ["README.md"]

    @pytest.mark.slow
    def test_the_built_site_has_no_broken_link(self, tmp_path):
        for package in ("mkdocs", "material", "mkdocstrings", "plotly"):
            if not importlib.util.find_spec(package):
                pytest.skip(f"{package} is not installed; it belongs to the extra 'docs'")
        environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        pages = {path: Page(path) for path in (tmp_path / "site").rglob("*.html") if path.name != "404.html"}
        assert len(pages) > 40
        broken = []
        for path, page in pages.items():
            assert not page.fetched, f"{path} loads {page.fetched}"
            for link in page.links:
                place, _, anchor = urllib.parse.unquote(link).partition("#")
                target = (path.parent / place).resolve() if place else path
                target = target / "index.html" if target.is_dir() else target
                if not target.exists() or (anchor and target in pages and anchor not in pages[target].names):
                    broken.append(f"{path.relative_to(tmp_path / 'site')}: {link}")
        assert not broken


class Page(html.parser.HTMLParser):
    """The links and anchors of a page, and what it would fetch from elsewhere."""

    def __init__(self, path):
        super().__init__()
        self.links, self.names, self.fetched = set(), set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.names.update(found[key] for key in ("id", "name") if found.get(key))
        for key in ("href", "src"):
            link = found.get(key)
            if link and urllib.parse.urlparse(link).scheme:
                if tag != "a":
                    self.fetched.append(link)
            elif link:
                self.links.add(link)


NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebooks_have_no_outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebooks_run(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs the extra 'docs'")
    pytest.importorskip("ipykernel", reason="needs the extra 'docs'")
    pytest.importorskip("mmdet", reason="needs the extra 'openmmlab'")
    pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    import nbformat
    from jupyter_client.manager import AsyncKernelManager

    class ThisPython(AsyncKernelManager):
        """The kernel of this environment, whichever kernels the machine has."""

        @property
        def kernel_spec(self):
            from jupyter_client.kernelspec import KernelSpec

            return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_manager_class=ThisPython, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
