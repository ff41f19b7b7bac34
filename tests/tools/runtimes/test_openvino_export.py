"""The state of a process after its OpenVINO models are gone."""

import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("openvino", reason="needs the extra 'export'")

SCRIPT = """
import gc, signal, subprocess, sys
from pathlib import Path
from terrazzo.tools.runtimes.openvino import open_openvino
models = [open_openvino(Path(sys.argv[1]))[0] for _ in range(2)]
while models:
    models.pop(0)
gc.collect()
signal.signal(signal.SIGCHLD, lambda *arguments: print("handled"))
subprocess.run([sys.executable, "-c", ""], check=True)
"""


@pytest.mark.long
def test_signals_after_models_are_gone(tmp_path):
    """If two cores are destroyed in the order of their creation, OpenVINO takes the thread's signal stack away."""
    path = tmp_path / "model.onnx"
    program = torch.export.export(nn.Linear(2, 2).eval(), (torch.ones(1, 2),))
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
