"""The pages that people read: their links exist, and README stays short."""

import re

import pytest

from terrazzo.tools import results
from terrazzo.tools.reports import cards

PAGES = [*cards.pages(), *(results.ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_merge_was_left_half_done(page):
    assert not re.search(r"^(<{7} |={7}$|>{7} )", page.read_text(), re.MULTILINE)


def test_the_way_of_a_tensor_names_what_exists():
    """The packages contain each file, and each word in `code`, that the page names."""
    page = results.ROOT / "docs" / "the-way-of-a-tensor.md"
    packages = ("backbones", "kernels", "openmmlab", "tools")
    files = [path for folder in packages for path in (results.ROOT / folder).rglob("*.py")]
    files += results.ROOT.glob("*.py")
    paths = "\n".join(f"/{path.relative_to(results.ROOT)}" for path in files)
    words = {word for path in files for word in re.findall(r"\w+", f"{path.stem} {path.read_text()}")}
    for text in re.findall(r"`([^`\n]+)`", page.read_text()):
        if text.endswith((".py", "/")):
            assert text in paths, text
        assert set(re.findall(r"[A-Za-z_]{3,}", text.removesuffix(".py"))) <= words, text


def test_readme_is_short():
    assert len((results.ROOT / "README.md").read_text().splitlines()) <= 200
