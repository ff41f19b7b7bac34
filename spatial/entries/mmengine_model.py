"""mmengine's containers, and its batch norm in the place of a SyncBatchNorm."""

from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._norms import batch_norm

ENTRIES = {**dict.fromkeys(("Sequential", "ModuleList", "ModuleDict"), OWN), "_BatchNormXd": Entry(batch_norm)}
