"""Non-maximum suppression of quadrilaterals."""

from torch import Tensor

from terrazzo.openmmlab.ops._overlaps import suppress
from terrazzo.openmmlab.ops.box_iou_quadri import quadri_corners, quadri_overlaps


def nms_quadri(
    dets: Tensor, scores: Tensor, order: Tensor, dets_sorted: Tensor, iou_threshold: float, multi_label: bool
) -> Tensor:
    """Keeps each box that overlaps no kept box of higher score by more than the threshold.

    Labels make no difference, as in compiled mmcv: `mmcv.ops.batched_nms` moves boxes of different classes apart.

    Args:
        dets: as `dets_sorted`, unsorted; not used.
        scores: N; not used, as `order` says what is needed.
        order: N, indices of the boxes by descending score.
        dets_sorted: N x 8 by descending score, as x y of four corners; a ninth column, the label, is not used.
        iou_threshold: a box is dropped if its intersection over union with a kept box is above this.
        multi_label: whether there is a label column; not used.

    Returns:
        Indices of the kept boxes, by descending score.
    """
    return suppress(quadri_corners(dets_sorted[:, :8]), order, iou_threshold, quadri_overlaps)
