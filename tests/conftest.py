"""Fixtures and options for all tests: an option to store capability results, and a separate cache folder."""

import functools
import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest

# Failures in these modules show both sides of a comparison, as failures in test files do.
pytest.register_assert_rewrite("support")


def pytest_configure(config):
    # All processes and later runs share compiled kernels. Numba reads this variable when it is imported.
    os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "numba"))
    # Tracing makes millions of small objects that live, and each collection looks at all of them again.
    gc.set_threshold(100_000, 50, 100)


def pytest_addoption(parser):
    parser.addoption(
        "--write-capabilities",
        action="store_true",
        help="store the results of the capability tests in model_cards/results/capabilities.csv, without a comparison",
    )


@pytest.fixture(scope="session")
def frozen_modules():
    """The number of modules at the last call of `gc.freeze`."""
    return {"modules": 0}


@pytest.fixture(autouse=True)
def quick_garbage_collection(frozen_modules):
    """Exclude imported packages from garbage collection: mmengine collects for each data set, 0.5 s with mmdet."""
    if len(sys.modules) > frozen_modules["modules"] + 50:
        gc.collect()
        gc.freeze()
        frozen_modules["modules"] = len(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def unformatted_configs():
    """Write configs without formatting: yapf takes longer than most training runs of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("yapf") is None:
            yield
            return
        patch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda text, **options: (text, True))
        if "mmengine.config.config" in sys.modules:
            patch.setattr("mmengine.config.config.FormatCode", lambda text, **options: (text, True))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_onnx_registry():
    """Keep the exporter's table of ONNX functions: PyTorch compiles it from source text at each export, 0.6 s."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            from torch.onnx._internal.exporter._registration import ONNXRegistry

            patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        except (ImportError, AttributeError):  # the names are PyTorch's own, and a version may lack them
            pass
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keep the command's cache in a folder of the tests, also in subprocesses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
