"""Shared by all tests: the option that stores the results of the capability tests, and a separate cache folder."""

import pytest

# Failures in these modules show both sides of a comparison, as in test files.
pytest.register_assert_rewrite("support")


def pytest_addoption(parser):
    parser.addoption(
        "--write-capabilities",
        action="store_true",
        help="store what the capability tests find in model_cards/results/capabilities.csv, rather than compare",
    )


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The command's cache, also in subprocesses, is in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
