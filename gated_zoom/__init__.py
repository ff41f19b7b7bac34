"""Gated zoom: a coarse pass over a picture, and a fine pass over the tiles where it pays.

    image -> reduced image -> model -> coarse logits, features        (`_passes`)
                              features -> gate: is a fine pass needed?        (`_heads`)
                              features or logits -> scores of tiles           (`_heads`, `_scores`)
             crops of the best tiles -> model -> fine logits                  (`_tiles`)
             coarse and fine logits -> logits                                 (`_fusion`, refined by `_heads`)

For detectors, boxes take the place of logits (`_detector`, `_boxes`).

`zoom` puts these together. `_labels` makes what the heads learn from; `terrazzo.openmmlab.ZoomHeads` trains them.
`_oracle` computes what a perfect choice of tiles would gain on a data set.

The package is not called `zoom`, because the function `terrazzo.zoom` has that name.
"""

from terrazzo.gated_zoom._boxes import Boxes as Boxes
from terrazzo.gated_zoom._heads import Gate as Gate
from terrazzo.gated_zoom._heads import Heads as Heads
from terrazzo.gated_zoom._heads import Refinement as Refinement
from terrazzo.gated_zoom._heads import RegionHead as RegionHead
from terrazzo.gated_zoom._heads import load_heads as load_heads
from terrazzo.gated_zoom._tiles import Grid as Grid
from terrazzo.gated_zoom._zoom import Coarse as Coarse
from terrazzo.gated_zoom._zoom import Look as Look
from terrazzo.gated_zoom._zoom import Zoom as Zoom
from terrazzo.gated_zoom._zoom import zoom as zoom

__all__ = ["Boxes", "Coarse", "Gate", "Grid", "Heads", "Look", "Refinement", "RegionHead", "Zoom", "load_heads", "zoom"]
