"""What hierarchical backbones share."""

from terrazzo.spatial._entries import OWN

ENTRIES = {"Stage": OWN}
