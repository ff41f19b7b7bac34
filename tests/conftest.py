"""What all tests share: the option that stores what the capability tests find, and a cache that is not the user's."""

import pytest

# Their failures show both sides of a comparison, as those of test files do.
pytest.register_assert_rewrite("support")


def pytest_addoption(parser):
    parser.addoption(
        "--write-capabilities",
        action="store_true",
        help="store what the capability tests find in model_cards/results/capabilities.csv, rather than compare",
    )


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What the command remembers, in processes of its own too, lies in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
