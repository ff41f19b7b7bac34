"""The pages that people read: their links lead somewhere, and README stays short."""

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


def test_readme_is_short():
    assert len((results.ROOT / "README.md").read_text().splitlines()) <= 200
