"""Facts about files are cached until files change; an unusable cache costs only time."""

import os
import time
from typing import NamedTuple

import pytest

from terrazzo.tools.data.checks import remembered
from terrazzo.tools.data.checks.remembered import look


class Size(NamedTuple):
    count: int


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "terrazzo" / "checked"


@pytest.fixture
def files(tmp_path):
    """Files that were written a minute ago."""
    paths = [tmp_path / "data" / f"{index}.txt" for index in range(40)]
    paths[0].parent.mkdir()
    for index, path in enumerate(paths):
        path.write_text("x" * index)
        age(path)
    return paths


def age(path, seconds=60):
    then = time.time() - seconds
    os.utime(path, (then, then))


class Examine:
    """Record the files that are examined."""

    def __init__(self):
        self.seen = []

    def __call__(self, path):
        self.seen.append(path.name)
        return Size(len(path.read_text()))


def sizes(files):
    examine = Examine()
    found = look("sizes", examine, Size, files)
    return [fact and fact.count for fact in found], examine.seen


def test_a_second_look_reads_no_file(cache, files):
    assert sizes(files)[0] == list(range(40))
    assert len(list(cache.iterdir())) == 1
    found, seen = sizes(files)
    assert (found, seen) == (list(range(40)), [])
    assert all(isinstance(fact, Size) for fact in look("sizes", Examine(), Size, files))


def test_what_changes_is_looked_at_again(cache, files):
    sizes(files)
    files[3].write_text("changed")
    files[4].unlink()
    age(files[5], 30)  # the time changes, the size stays
    found, seen = sizes(files)
    assert (found[3], found[4], found[5]) == (7, None, 5)
    assert sorted(seen) == ["3.txt", "5.txt"]


def test_other_facts_are_kept_apart(cache, files):
    sizes(files)
    examine = Examine()
    look("more", examine, Size, files)
    assert len(examine.seen) == 40


def test_a_file_that_was_just_written_is_not_remembered(cache, files):
    """A new file could change again within the resolution of its time."""
    files[7].write_text("now")
    sizes(files)
    assert sizes(files)[1] == ["7.txt"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"null", b"[" * 100000])
def test_a_damaged_cache_is_made_anew(cache, files, content):
    sizes(files)
    (store,) = cache.iterdir()
    store.write_bytes(content)
    assert sizes(files)[0] == list(range(40))
    assert sizes(files)[1] == []


@pytest.mark.parametrize("facts", [None, 7, [], [1, 2, 3]])
def test_damaged_facts_are_found_out_anew(cache, files, facts):
    import json

    sizes(files)
    (store,) = cache.iterdir()
    known = json.loads(store.read_text())
    store.write_text(json.dumps({path: [*entry[:2], facts] for path, entry in known.items()}))
    assert sizes(files)[0] == list(range(40))


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, files, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert sizes(files)[0] == list(range(40))
    assert len(sizes(files)[1]) == 40


def test_the_cache_lies_where_users_keep_theirs(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert remembered.cache_folder() == tmp_path / ".cache" / "terrazzo"


def test_an_interrupted_look_keeps_what_it_found(cache, files):
    class Stop(BaseException):
        pass

    def examine(path):
        if path.name == "39.txt":
            raise Stop
        return Size(0)

    with pytest.raises(Stop):
        look("sizes", examine, Size, files)
    assert len(sizes(files)[1]) < 40
