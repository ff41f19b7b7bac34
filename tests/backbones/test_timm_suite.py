"""timm's own tests/test_models.py, run on our models.

The suite is not copied: it travels in timm's source distribution, which is fetched for the installed version and kept
in `.cache`. FX and TorchScript are excepted (timm itself is leaving them), and so is loading pretrained weights, which
needs the authors' server.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from support.families import kinds
from support.processes import run_code

from terrazzo.tools.models import registered_models

TESTS = Path(__file__).parents[1]
CACHE = TESTS.parent / ".cache" / "timm"
ALL = tuple(registered_models())
EXCEPTED = "not fx and not torchscript and not pretrained"


@pytest.fixture(scope="session")
def suite():
    """The folder of timm's tests, of the version that is installed."""
    root = CACHE / f"timm-{timm.__version__}"
    if not (root / "tests" / "test_models.py").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        done = subprocess.run(
            [*command, "--dest", str(CACHE), f"timm=={timm.__version__}"], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no source distribution of timm {timm.__version__} could be fetched: {done.stderr[-200:]}")
        shutil.unpack_archive(next(CACHE.glob(f"timm-{timm.__version__}.tar.gz")), CACHE)
    if not (root / "tests" / "test_models.py").exists():
        pytest.skip(f"the source distribution of timm {timm.__version__} holds no tests")
    return root


def run(suite: Path, models: tuple[str, ...], select: str) -> str:
    code = f"import sys, pytest; sys.path.insert(0, {str(TESTS)!r}); sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-p", "support.timm_suite", "-p", "no:cacheprovider", "-qrp", "-W", "ignore"]
    environment = dict(os.environ, TERRAZZO_TIMM_MODELS=",".join(models))
    done = run_code(code, *options, "tests/test_models.py", "-k", select, cwd=suite, env=environment, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.long
def test_fast(suite):
    """All but the pruning test, which runs a model 20 times; the models share a process, for its start takes long."""
    models = kinds()
    out = run(suite, tuple(models), f"({' or '.join(models)}) and {EXCEPTED} and not prune")
    for name in models:
        assert len(re.findall(rf"^PASSED .*\b{name}\b", out, re.MULTILINE)) >= 5, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_all(suite, name):
    out = run(suite, (name,), f"{name} and {EXCEPTED}")
    assert " passed" in out
