"""The stem of plain ViTs. Every rank has the class token, and the tokens of its rows."""

from torch import nn

from terrazzo.spatial._entries import Entry
from terrazzo.spatial._tokens import stem


def _check(module: nn.Module) -> str | None:
    return None if isinstance(module.patches, nn.Conv2d) else "its patches are more than one convolution"


ENTRIES = {"TokenStem": Entry(stem, check=_check)}
