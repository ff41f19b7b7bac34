"""Non-maximum suppression of rotated boxes."""

from torch import Tensor

from terrazzo.openmmlab.ops._overlaps import suppress
from terrazzo.openmmlab.ops._polygons import rotated_corners
from terrazzo.openmmlab.ops.box_iou_rotated import rotated_overlaps


def nms_rotated(
    dets: Tensor,
    scores: Tensor,
    order: Tensor,
    dets_sorted: Tensor,
    labels: Tensor,
    iou_threshold: float,
    multi_label: bool,
) -> Tensor:
    """Keeps each box that overlaps no kept box of higher score by more than the threshold.

    Labels make no difference, as in compiled mmcv: `mmcv.ops.batched_nms` moves boxes of different classes apart.

    Args:
        dets: as `dets_sorted`, unsorted; not used.
        scores: N; not used, as `order` says what is needed.
        order: N, indices of the boxes by descending score.
        dets_sorted: N x 5 by descending score, as centre x and y, width, height, angle from x to y in radians; a
            sixth column, the label, is not used.
        labels: not used.
        iou_threshold: a box is dropped if its intersection over union with a kept box is above this.
        multi_label: whether there is a label column; not used.

    Returns:
        Indices of the kept boxes, by descending score.
    """
    return suppress(rotated_corners(dets_sorted[:, :5]), order, iou_threshold, rotated_overlaps)
