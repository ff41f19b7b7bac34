"""`terrazzo convert`: it reads and writes weights only."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from terrazzo.tools.cli import cli


def run(*arguments):
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)])


def test_to_safetensors_and_back(tmp_path):
    weights = {"a": torch.randn(3, 2), "b": torch.arange(4)}
    average = {"steps": torch.tensor(7), "module.a": torch.ones(3, 2), "module.b": torch.arange(4)}
    torch.save({"state_dict": weights, "ema_state_dict": average, "meta": {"epoch": 1}}, tmp_path / "in.pth")
    done = run(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert done.exit_code == 0, done.output
    assert "wrote 2 tensors, 10 numbers" in done.output
    assert torch.equal(load_file(tmp_path / "out.safetensors")["a"], weights["a"])
    assert run(tmp_path / "out.safetensors", tmp_path / "back.pth").exit_code == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert torch.equal(back["state_dict"]["a"], weights["a"])
    assert run(tmp_path / "in.pth", tmp_path / "ema.safetensors", "--ema").exit_code == 0
    found = load_file(tmp_path / "ema.safetensors")
    assert set(found) == {"a", "b"}
    assert torch.equal(found["a"], torch.ones(3, 2))


PLAIN, AVERAGE = {"a": torch.zeros(2)}, {"a": torch.ones(2)}


@pytest.mark.parametrize(
    ("content", "plain", "average"),
    [
        ({"model": PLAIN, "model_ema": AVERAGE, "epoch": 1}, 0, 1),
        ({"state_dict": PLAIN, "state_dict_ema": AVERAGE}, 0, 1),
        ({"model": PLAIN, "ema": {"module": AVERAGE, "updates": 3}}, 0, 1),
        ({"state_dict": PLAIN, "ema_state_dict": {"steps": torch.tensor(1), "module.a": AVERAGE["a"]}}, 0, 1),
        ({"module": PLAIN}, 0, None),
        ({"model": {"state_dict": {"module._orig_mod.a": PLAIN["a"]}}}, 0, None),
        ({"state_dict": {"a": np.zeros(2, np.float32), "note": "x", "more": [torch.ones(1)], 3: None}}, 0, None),
        (PLAIN, 0, None),
        ({"model_ema": AVERAGE}, None, 1),
    ],
)
def test_weights_are_found(content, plain, average, tmp_path):
    torch.save(content, tmp_path / "in.pth")
    for options, value in (((), plain), (("--ema",), average)):
        done = run(tmp_path / "in.pth", tmp_path / "out.safetensors", *options)
        assert done.exit_code == (2 if value is None else 0), done.output
        if value is None:
            assert len(done.output.splitlines()) == 1
        else:
            found = load_file(tmp_path / "out.safetensors")
            assert {name: tensor.tolist() for name, tensor in found.items()} == {"a": [value, value]}


def test_nested_weights_keep_their_place(tmp_path):
    torch.save({"model": {"body": {"a": torch.zeros(2)}, "head": {"a": torch.ones(2)}}}, tmp_path / "in.pth")
    assert run(tmp_path / "in.pth", tmp_path / "out.safetensors").exit_code == 0
    assert set(load_file(tmp_path / "out.safetensors")) == {"body.a", "head.a"}


def test_tensors_that_share_memory(tmp_path):
    """Parts of a tensor become separate tensors; tied weights stay a single tensor."""
    whole, tied = torch.arange(10000.0), torch.ones(5000)
    torch.save({"a": whole[:2], "b": whole[1:3], "c": tied, "d": tied}, tmp_path / "in.pth")
    for suffix in (".pth", ".safetensors"):
        assert run(tmp_path / "in.pth", tmp_path / f"out{suffix}").exit_code == 0
    assert (tmp_path / "out.pth").stat().st_size < 30000
    loaded = torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"]
    assert (loaded["a"].tolist(), loaded["b"].tolist()) == ([0, 1], [1, 2])
    assert loaded["c"].data_ptr() == loaded["d"].data_ptr()
    assert load_file(tmp_path / "out.safetensors")["b"].tolist() == [1, 2]


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), 3, "x", None, {3: torch.ones(2)}], ids=str)
def test_what_holds_no_named_tensors_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "in.pth")
    done = run(tmp_path / "in.pth", tmp_path / "out.pth")
    assert done.exit_code == 2
    assert len(done.output.splitlines()) == 1
    assert "in.pth h" in done.output
    assert not (tmp_path / "out.pth").exists()


def test_licence_is_said(tmp_path):
    """The command states the licence of weights if their names identify the model."""
    save_file({"backbone.levels.2.blocks.0.mixer.A_log": torch.ones(2, 8)}, tmp_path / "in.safetensors")
    done = run(tmp_path / "in.safetensors", tmp_path / "out.pth")
    assert done.exit_code == 0
    assert "CC-BY-NC-SA-4.0: no commercial use" in done.output


def test_refusals_write_nothing(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "in.safetensors")
    torch.save({"meta": {}}, tmp_path / "empty.pth")
    for arguments, words in (
        ((tmp_path / "in.safetensors", tmp_path / "out.bin"), "ends in neither"),
        ((tmp_path / "in.safetensors", tmp_path / "no" / "out.pth"), "is not a folder"),
        ((tmp_path / "in.safetensors", tmp_path / "out.pth", "--ema"), "no ema_state_dict"),
        ((tmp_path / "empty.pth", tmp_path / "out.pth"), "holds no weights"),
        ((tmp_path / "missing.pth", tmp_path / "out.pth"), "does not exist"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2
        assert words in done.output
        assert len(done.output.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.pth", "in.safetensors"]
