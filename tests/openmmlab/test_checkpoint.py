"""Checkpoints are plain data, resume exactly, and run no code when loaded."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import CheckpointLoader

from terrazzo.errors import InputError
from terrazzo.openmmlab.checkpoint import load_file, plain, save_checkpoint
from terrazzo.openmmlab.config import build_runner

FLOORS = "fpn_dinat-mini_floors"


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    """The work dir of a training of three iterations."""
    from terrazzo.openmmlab.config import load_config

    folder = tmp_path_factory.mktemp("trained")
    options = {"train_dataloader.batch_size": 2, "train_cfg.max_iters": 3, "train_cfg.val_interval": 6}
    build_runner(load_config(FLOORS, tiny_data("floors"), options), folder, seed=3).train()
    return folder


@pytest.mark.long
def test_loads_where_there_is_only_torch(trained):
    code = (
        "import sys, torch\n"
        "checkpoint = torch.load(sys.argv[1], weights_only=True)\n"
        "assert not {'terrazzo', 'mmengine', 'timm'} & set(sys.modules)\n"
        "print(*sorted(checkpoint)); print(len(checkpoint['message_hub']['log_scalars']['train/loss']['log']))\n"
        "print(checkpoint['meta']['iter'], *checkpoint['meta']['dataset_meta']['classes'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(trained / "iter_3.pth")], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "message_hub meta optimizer param_schedulers state_dict"
    assert lines[1] == "3"
    assert lines[2] == "3 cement marble granite basalt jasper glass"


@pytest.mark.long
def test_nothing_temporary_is_left(trained):
    assert not [path for path in trained.iterdir() if path.name.startswith(".")]


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    save_checkpoint({"a": 1}, str(path))

    def broken(checkpoint, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint({"a": 2}, str(path))
    assert [item.name for item in tmp_path.iterdir()] == ["x.pth"]
    assert torch.load(path, weights_only=True) == {"a": 1}


def test_plain_forms(tmp_path):
    value = {
        "scalar": np.float64(0.5),
        "array": np.arange(4).reshape(2, 2),
        "set": {3},
        "path": tmp_path,
        "type": int,
        "nested": (np.int64(1), [np.bool_(True)]),
    }
    expected = {"scalar": 0.5, "array": [[0, 1], [2, 3]], "set": [3], "nested": (1, [True])}
    expected |= {"path": str(tmp_path), "type": "<class 'int'>"}
    result = plain(value)
    assert result == expected
    assert type(result["scalar"]) is float


def test_message_hub_takes_both_forms():
    history = HistoryBuffer([1.0, 2.0], [1, 3])
    for form in (history, plain(history)):
        hub = MessageHub(f"hub-{type(form).__name__}")
        hub.load_state_dict(
            {"log_scalars": {"loss": form}, "runtime_info": {"iter": 2}, "resumed_keys": {"loss": True}}
        )
        restored = hub.get_scalar("loss")
        assert restored.data[0].tolist() == [1.0, 2.0]
        assert restored.mean() == history.mean()
        assert hub.get_info("iter") == 2


def test_foreign_checkpoint_with_histories_and_arrays(tmp_path):
    path = tmp_path / "foreign.pth"
    hub = MessageHub("foreign")
    hub.update_scalar("loss", 0.25)
    hub.update_info("array", np.arange(3.0))
    hub.update_info("number", np.float32(0.5))
    torch.save({"state_dict": {"w": torch.ones(2)}, "message_hub": hub.state_dict()}, path)
    checkpoint = CheckpointLoader.load_checkpoint(str(path))
    restored = MessageHub("restored")
    restored.load_state_dict(checkpoint["message_hub"])
    assert restored.get_scalar("loss").current() == 0.25
    assert restored.get_info("array").tolist() == [0, 1, 2]
    assert restored.get_info("number") == 0.5


class Harmful:
    def __reduce__(self):
        return os.mkdir, (HARM,)


HARM = ""


def test_code_in_a_checkpoint_is_refused_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "HARM", str(tmp_path / "harmed"))
    path = tmp_path / "harmful.pth"
    torch.save({"state_dict": {}, "extra": Harmful()}, path)
    with pytest.raises(InputError, match=r"harmful\.pth.*mkdir"):
        load_file(path)
    with pytest.raises(InputError, match="refused"):
        CheckpointLoader.load_checkpoint(str(path))
    assert not (tmp_path / "harmed").exists()


def test_pickle_that_is_no_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "HARM", str(tmp_path / "harmed"))
    path = tmp_path / "plain.pth"
    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(InputError, match="refused"):
        load_file(path)
    assert not (tmp_path / "harmed").exists()


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_file(tmp_path / "no.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(InputError, match="not a checkpoint"):
        load_file(tmp_path / "text.pth")


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def test_a_hundred_damaged_files_give_one_line_each(tmp_path):
    whole, path = tmp_path / "whole.pth", tmp_path / "damaged.pth"
    content = {"state_dict": {"a": torch.randn(40, 30), "b": torch.arange(9)}, "meta": {"epoch": 3, "name": "x"}}
    save_checkpoint(content, str(whole))
    data, random, lines = whole.read_bytes(), np.random.default_rng(0), []
    for number in range(100):
        if number % 2:
            path.write_bytes(data[: int(random.integers(0, len(data)))])
        else:
            damaged = bytearray(data)
            damaged[int(random.integers(0, len(data)))] ^= 1 << int(random.integers(0, 8))
            path.write_bytes(damaged)
        try:
            loaded = load_file(path)
        except InputError as error:
            lines.append(str(error))
        else:  # the flipped bit lies in padding between the archive's parts
            assert number % 2 == 0
            assert same(loaded, content)
    assert len(lines) > 80
    assert all("damaged.pth" in line and "\n" not in line for line in lines)


def test_damaged_safetensors_is_one_line(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_checkpoint({"state_dict": {"a": torch.randn(4, 3)}}, str(path))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"weights\.safetensors' is refused"):
        load_file(path)


def test_safetensors_out_and_in(tmp_path):
    tied = torch.randn(3, 4)
    path = tmp_path / "weights.safetensors"
    save_checkpoint({"state_dict": {"a": tied, "b": tied, "c": tied.t()}, "meta": {"epoch": 1}}, str(path))
    loaded = load_file(path)
    assert set(loaded) == {"a", "b", "c"}
    assert torch.equal(loaded["c"], tied.t())
    assert torch.equal(loaded["b"], tied)
    with pytest.raises(InputError, match="holds only tensors"):
        save_checkpoint({"state_dict": {"a": 1}}, str(tmp_path / "other.safetensors"))
    assert [item.name for item in tmp_path.iterdir()] == ["weights.safetensors"]
