"""The examples of docs/ecosystem.md run as they stand, without downloads."""

import re
from pathlib import Path

import pytest
import timm

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs" / "ecosystem.md").read_text()
EXAMPLES = re.findall(r"^## (.+)\n(?:(?!^## ).*\n)*?```python\n((?:.*\n)*?)```", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_example(title, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_AUTOINSTALL", "false")
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    try:
        exec(compile(code, f"ecosystem.md, {title}", "exec"), {"__name__": "example"})
    except ModuleNotFoundError as error:
        if error.name in ("terrazzo", None) or error.name.startswith("terrazzo."):
            raise
        pytest.skip(f"needs the extra 'ecosystem': {error}")


def test_every_framework_has_a_section():
    linked = set(re.findall(r"^\| \[[^\]]+\]\(#([^)]+)\)", PAGE, re.MULTILINE))
    titles = re.findall(r"^## (.+)", PAGE, re.MULTILINE)
    headings = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    assert linked == headings
    assert len(EXAMPLES) == 9
