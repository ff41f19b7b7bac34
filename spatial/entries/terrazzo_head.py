"""The classifier heads of maps."""

from terrazzo.spatial._entries import OWN

ENTRIES = dict.fromkeys(("Head", "TokenHead", "ClassToken"), OWN)
