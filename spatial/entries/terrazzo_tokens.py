"""What runs the blocks of plain ViTs: with all tokens in their places, or with merged tokens."""

from torch import nn

from terrazzo.backbones._tokens import Reducer
from terrazzo.spatial._entries import Entry


def _check(reducer: nn.Module) -> str | None:
    return None if type(reducer) is Reducer else "merges tokens, which needs the tokens of the whole image"


ENTRIES = {"Reducer": Entry(check=_check)}
