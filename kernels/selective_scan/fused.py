"""The selective scan in Triton."""

from terrazzo.kernels.selective_scan.portable import Call as Call

CHUNK = 256
_STATES = 64


def fits(states: int) -> bool:
    """Whether registers hold so many states. A plain bool also where the number is symbolic."""
    if states <= _STATES:  # noqa: SIM103
        return True
    return False


def misfit(states_fit: bool) -> str | None:
    return "is not written yet"
