"""Processes that share an image: training equals one process, with gloo."""

import os
import subprocess
import sys

import pytest
from support import spatial_worker


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_train_as_one_process(ranks, tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, spatial_worker.__file__, str(rank), str(ranks), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * ranks, "\n".join(outputs)[-4000:]
    assert "unwaited" not in "".join(outputs)
