"""The peak memory of processes that share an image, beside that of one process."""

import os
import subprocess
import sys

import pytest
from support import spatial_memory_worker


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak memory of a part of a program")
def test_four_processes_take_less_than_half_of_the_memory_of_one(tmp_path):
    def peaks(ranks: int) -> list[float]:
        command = [sys.executable, spatial_memory_worker.__file__]
        started = [
            subprocess.Popen(
                [*command, str(rank), str(ranks), str(tmp_path / f"store{ranks}"), "dinat_mini", "1024"],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(ranks)
        ]
        outputs = [process.communicate(timeout=1200)[0] for process in started]
        assert [process.returncode for process in started] == [0] * ranks
        return [float(text) for text in outputs]

    assert max(peaks(4)) <= 0.45 * peaks(1)[0]
