"""`terrazzo convert`: weights alone, in and out."""

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


def test_licence_is_said(tmp_path):
    """Of weights whose names say whose they are."""
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
