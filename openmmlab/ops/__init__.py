"""The table of mmcv's compiled operators that terrazzo provides: one operator, one file, one line here.

The signatures are those with which the Python side of `mmcv.ops` calls its compiled module: output tensors are
allocated by the caller, passed in and filled in place.
"""

from terrazzo.openmmlab.ops.focal_loss import (
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
    softmax_focal_loss_backward,
    softmax_focal_loss_forward,
)
from terrazzo.openmmlab.ops.info import get_compiler_version, get_compiling_cuda_version
from terrazzo.openmmlab.ops.nms import nms
from terrazzo.openmmlab.ops.roi_align import roi_align_backward, roi_align_forward
from terrazzo.openmmlab.ops.softnms import softnms

OPERATORS = {
    function.__name__: function
    for function in (
        get_compiler_version,
        get_compiling_cuda_version,
        nms,
        roi_align_backward,
        roi_align_forward,
        sigmoid_focal_loss_backward,
        sigmoid_focal_loss_forward,
        softmax_focal_loss_backward,
        softmax_focal_loss_forward,
        softnms,
    )
}
