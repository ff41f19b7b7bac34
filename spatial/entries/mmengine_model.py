"""mmengine's containers."""

from terrazzo.spatial._entries import OWN

ENTRIES = dict.fromkeys(("Sequential", "ModuleList", "ModuleDict"), OWN)
