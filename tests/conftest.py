"""Shared by all tests: the option that stores the results of the capability tests, and a separate cache folder."""

import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest

# Failures in these modules show both sides of a comparison, as in test files.
pytest.register_assert_rewrite("support")


def pytest_configure(config):
    # Compiled kernels are kept from run to run, and for all processes. Numba reads this when it is imported.
    os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "numba"))


def pytest_addoption(parser):
    parser.addoption(
        "--write-capabilities",
        action="store_true",
        help="store what the capability tests find in model_cards/results/capabilities.csv, rather than compare",
    )


@pytest.fixture(scope="session")
def frozen_modules():
    """How many modules were there when garbage collection last let go of what is there."""
    return {"modules": 0}


@pytest.fixture(autouse=True)
def quick_garbage_collection(frozen_modules):
    """Objects of imported packages are no garbage. mmengine collects for each data set, half a second with mmdet."""
    if len(sys.modules) > frozen_modules["modules"] + 50:
        gc.collect()
        gc.freeze()
        frozen_modules["modules"] = len(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def unformatted_configs():
    """Configs are written down as mmengine puts them together: yapf takes longer than most trainings here."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("yapf") is None:
            yield
            return
        patch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda text, **options: (text, True))
        if "mmengine.config.config" in sys.modules:
            patch.setattr("mmengine.config.config.FormatCode", lambda text, **options: (text, True))
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The command's cache, also in subprocesses, is in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
