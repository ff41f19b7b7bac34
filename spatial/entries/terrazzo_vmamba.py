"""VMamba."""

from terrazzo.spatial._entries import OWN

ENTRIES = dict.fromkeys(("VMamba", "VSSBlock", "Stem"), OWN)
