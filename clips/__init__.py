"""Clips: modules that mix the frames of a short video, from Axial-VS.

    maps of a clip's frames -> AxialTrajectoryEncoder: heights, then widths, over all frames    (within a clip)
    queries of several clips -> CrossClipTracker: trajectories of queries, and a temporal ASPP  (across clips)

The modules need no extra of terrazzo; the function `aligned` needs SciPy, which the extra `openmmlab` brings.
`terrazzo.openmmlab.clips` puts the modules into mmdetection's video models. Frames of a batch of clips are batch-major
everywhere: all frames of the first clip come first.

Paper: A Simple Video Segmenter by Tracking Objects Along Axial Trajectories, TMLR 2024, arXiv 2311.18537 (first called
MaXTron). Official code: github.com/TACJu/Axial-VS (Apache-2.0). Parameters have the authors' names.
"""

from terrazzo.clips.axial import AxialTrajectoryEncoder as AxialTrajectoryEncoder
from terrazzo.clips.axial import AxialTrajectoryLayer as AxialTrajectoryLayer
from terrazzo.clips.cross_clip import CrossClipTracker as CrossClipTracker
from terrazzo.clips.cross_clip import TemporalASPP as TemporalASPP
from terrazzo.clips.matching import aligned as aligned
from terrazzo.clips.positions import positions_3d as positions_3d
from terrazzo.clips.trajectory import TrajectoryAttention as TrajectoryAttention

__all__ = [
    "AxialTrajectoryEncoder",
    "AxialTrajectoryLayer",
    "CrossClipTracker",
    "TemporalASPP",
    "TrajectoryAttention",
    "aligned",
    "positions_3d",
]
