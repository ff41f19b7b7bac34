"""The setting of the C library's memory."""

import types

import pytest
import torch

from terrazzo.spatial import _allocator

MMAP, TRIM = -3, -1
CPU = torch.device("cpu")


@pytest.fixture
def settings(monkeypatch):
    """What is set, in its order."""
    found = []
    library = types.SimpleNamespace(mallopt=lambda option, value: found.append((option, value)))
    monkeypatch.setattr(_allocator.ctypes, "CDLL", lambda name: library)
    for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_the_last_user_ends_it(settings):
    first, second = _allocator.returned_at_once(CPU), _allocator.returned_at_once(CPU)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert settings == [(MMAP, 1 << 20)]
    second.__exit__(None, None, None)
    assert settings[1:] == [(MMAP, 1 << 25), (TRIM, 1 << 26)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_MMAP_THRESHOLD_", "65536"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536")],
)
def test_a_threshold_of_the_environment_stays(name, value, settings, monkeypatch):
    monkeypatch.setenv(name, value)
    with _allocator.returned_at_once(CPU):
        pass
    assert not settings
