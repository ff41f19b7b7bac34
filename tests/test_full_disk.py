"""Files of results on a full disk: an error names the file, and nothing half-written stays."""

import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="the system has no limit of a file's size")

PROGRAM = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from PIL import Image
from terrazzo._files import written_whole
from terrazzo.tools.predict.output import ClipOutput, write_prediction
from terrazzo.tools.predict.prediction import Prediction

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
noise = np.random.default_rng(0).integers(0, 256, (6, 96, 128, 3)).astype(np.uint8)
frames = [Image.fromarray(pixels) for pixels in noise]


def prediction(frame, **more):
    return Prediction(dict(width=128, height=96, **more), lambda: frame)


def write(out, what):
    if what == "text":
        with written_whole(out / "x.txt") as path:
            path.write_text("x" * 10_000)
    elif what == "picture":
        write_prediction(out, "x", prediction(frames[0]))
    else:
        with ClipOutput(out, "x", 10, live=False) as clip:
            for frame in frames:
                clip.add(prediction(frame, words="x" * (10_000 if what == "lines" else 1)))


for what, limit in zip(sys.argv[2::2], sys.argv[3::2]):
    out = Path(sys.argv[1]) / what / limit
    out.mkdir(parents=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    try:
        write(out, what)
        print("written")
    except OSError as error:
        print(error.filename, error.strerror)
"""


@pytest.mark.long
def test_nothing_stays(tmp_path):
    pytest.importorskip("cv2", reason="needs the extra 'video'")
    cases = (
        ("text", 4096, "x.txt"),
        ("picture", 4096, "x.overlay.jpg"),  # Pillow ends well, with half a file
        ("video", 32768, "x.overlay.mp4"),  # and so does OpenCV
        ("lines", 40_000, "x.overlay.mp4"),  # lines that cannot be written end the whole clip
    )
    asked = [word for what, limit, _ in cases for word in (what, str(limit), what, "10000000")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path, *asked], capture_output=True, text=True, timeout=200
    )
    said = done.stdout.splitlines()
    assert len(said) == 2 * len(cases), done.stderr
    for (what, limit, file), full, roomy in zip(cases, said[::2], said[1::2]):
        assert full.startswith(f"{tmp_path / what / str(limit) / file} "), said
        assert not list((tmp_path / what / str(limit)).iterdir())
        assert roomy == "written"
        assert list((tmp_path / what / "10000000").iterdir())
