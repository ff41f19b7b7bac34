"""PyTorch's batch norm. A SyncBatchNorm is refused: BatchNorm2d does the same here, over the group."""

from terrazzo.spatial._entries import Entry
from terrazzo.spatial._norms import batch_norm

ENTRIES = {"BatchNorm2d": Entry(batch_norm)}
