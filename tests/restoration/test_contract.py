"""The contract of restoration networks, for every registered family."""

from support.restoration_contract import RestorationContract


class TestRestorationNetworks(RestorationContract):
    pass
