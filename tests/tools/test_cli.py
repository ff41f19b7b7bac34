"""The whole command: help, lazy subcommands, exit codes, and one line for an error."""

import click
import pytest
from support.processes import run_code
from torch.utils.data import DataLoader, Dataset

from terrazzo import __version__
from terrazzo.errors import BackendError, InputError, install_command
from terrazzo.tools.cli import VERBS, cli, error_line


def test_help_names_every_verb(run):
    for arguments in ((), ("--help",), ("-h",)):
        result = run(*arguments)
        assert result.exit_code == 0
        assert all(verb in result.output for verb in VERBS)


def test_version(run):
    assert __version__ in run("--version").output


def test_list_leaves_the_heavy_packages_alone():
    code = (
        "import sys\nfrom terrazzo.tools.cli import cli\n"
        "try: cli.main(['list', 'dinat_mini'])\nexcept SystemExit: pass\n"
        "heavy = {'mmengine', 'mmdet', 'mmseg', 'onnx', 'onnxruntime', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = run_code(code)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


@pytest.mark.parametrize("verb", ["list", "info", "explain", "train", "test", "infer", "export", "demo"])
def test_every_verb_has_help(run, verb):
    result = run(verb, "--help")
    assert result.exit_code == 0, result.output
    assert "Usage: terrazzo" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("polish",), "no verb 'polish'; the verbs are: list"),
        (("--shine",), "--shine"),
        (("info",), "MODEL"),
        (("info", "resnet18", "--size", "3"), "--size"),
        (("export", "resnet18", "--batch", "0"), "--batch"),
        (("export", "resnet18", "--format", "caffe"), "onnx"),
        (("demo", "--seed", "many"), "--seed"),
        (("infer", "resnet18"), "IMAGE"),
    ],
)
def test_wrong_usage_is_one_line(refused, arguments, words):
    assert words in refused(*arguments)


def test_errors_in_a_process_of_their_own(shell):
    result = shell("info", "dinat_minny")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: no model is called 'dinat_minny'; did you mean ")
    assert "dinat_mini" in result.stderr
    assert result.stderr.count("\n") == 1


def test_traceback_on_request(shell):
    result = shell("info", "dinat_minny", TERRAZZO_TRACEBACK="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "InputError" in result.stderr


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("two\n  lines"), "error: two lines"),
        (BackendError("no"), "error: no"),
        (ModuleNotFoundError("no", name="mmengine.config"), install_command("openmmlab")),
        (ModuleNotFoundError("no", name="scipy"), install_command("openmmlab")),
        (ModuleNotFoundError("no", name="onnxscript"), install_command("export")),
        (PermissionError(13, "Permission denied", "/somewhere"), "error: /somewhere: Permission denied"),
    ],
)
def test_error_lines(error, line):
    assert line in error_line(error)
    assert "\n" not in error_line(error)


class _Damaged(Dataset):
    """A data set in which every item fails with an error that has a cause."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            raise OSError("cut short")
        except OSError as error:
            raise InputError(f"picture {index}.jpg is damaged:\n{error}") from error


def test_errors_of_worker_processes_are_one_line():
    """PyTorch puts the traceback of the worker into the message."""
    with pytest.raises(InputError, match="Traceback") as caught:
        next(iter(DataLoader(_Damaged(), num_workers=1)))
    assert error_line(caught.value) == "error: picture 0.jpg is damaged: cut short"


@pytest.mark.parametrize("error", [RuntimeError("bug"), ModuleNotFoundError("no", name="terrazzo.x"), OSError("bug")])
def test_bugs_are_not_dressed_up(error):
    assert error_line(error) is None


def test_interrupt(run, monkeypatch):
    @click.command()
    def command():
        raise KeyboardInterrupt

    monkeypatch.setattr(type(cli), "get_command", lambda self, ctx, name: command)
    ended = []
    # It would kill the processes of other tests, and let this process and its children ignore signals.
    monkeypatch.setattr("terrazzo.tools.cli.end_children", lambda: ended.append(True))
    result = run("list")
    assert result.exit_code == 130
    assert ended
    assert "Traceback" not in result.output
