"""The command in error messages about missing packages."""

import importlib.metadata
from types import SimpleNamespace

import pytest

from terrazzo import errors


def test_a_checkout_is_installed_from_its_folder(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "errors.py"))
    assert errors.install_command("cpu") == f"pip install -e '{tmp_path}[cpu]'"


@pytest.mark.parametrize(
    ("record", "command"),
    [
        (
            '{"url": "file:///wheels/terrazzo-1-py3-none-any.whl"}',
            "'terrazzo[cpu] @ file:///wheels/terrazzo-1-py3-none-any.whl'",
        ),
        (None, "'terrazzo[cpu]'"),  # from an index
        ("{", "'terrazzo[cpu]'"),
    ],
)
def test_a_wheel_is_installed_from_where_it_came_from(tmp_path, monkeypatch, record, command):
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "errors.py"))
    found = SimpleNamespace(read_text=lambda name: record)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: found)
    assert errors.install_command("cpu") == f"pip install {command}"
