"""The table of mmcv's compiled operators that terrazzo provides: one operator, one file, one line here.

The signatures are those with which the Python side of `mmcv.ops` calls its compiled module: output tensors are
allocated by the caller, passed in and filled in place.
"""

from terrazzo.openmmlab.ops.active_rotated_filter import active_rotated_filter_backward, active_rotated_filter_forward
from terrazzo.openmmlab.ops.bbox_overlaps import bbox_overlaps
from terrazzo.openmmlab.ops.bias_act import bias_act
from terrazzo.openmmlab.ops.border_align import border_align_backward, border_align_forward
from terrazzo.openmmlab.ops.box_iou_quadri import box_iou_quadri
from terrazzo.openmmlab.ops.box_iou_rotated import box_iou_rotated
from terrazzo.openmmlab.ops.carafe import carafe_backward, carafe_forward, carafe_naive_backward, carafe_naive_forward
from terrazzo.openmmlab.ops.chamfer_distance import chamfer_distance_backward, chamfer_distance_forward
from terrazzo.openmmlab.ops.convex_iou import convex_giou, convex_iou
from terrazzo.openmmlab.ops.correlation import correlation_backward, correlation_forward
from terrazzo.openmmlab.ops.deform_conv import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
)
from terrazzo.openmmlab.ops.deform_roi_pool import deform_roi_pool_backward, deform_roi_pool_forward
from terrazzo.openmmlab.ops.diff_iou_rotated import diff_iou_rotated_sort_vertices_forward
from terrazzo.openmmlab.ops.filtered_lrelu import filtered_lrelu, filtered_lrelu_act_
from terrazzo.openmmlab.ops.focal_loss import (
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
    softmax_focal_loss_backward,
    softmax_focal_loss_forward,
)
from terrazzo.openmmlab.ops.fused_bias_leakyrelu import fused_bias_leakyrelu
from terrazzo.openmmlab.ops.info import get_compiler_version, get_compiling_cuda_version
from terrazzo.openmmlab.ops.masked_conv import masked_col2im_forward, masked_im2col_forward
from terrazzo.openmmlab.ops.min_area_polygons import min_area_polygons
from terrazzo.openmmlab.ops.modulated_deform_conv import modulated_deform_conv_backward, modulated_deform_conv_forward
from terrazzo.openmmlab.ops.ms_deform_attn import ms_deform_attn_backward, ms_deform_attn_forward
from terrazzo.openmmlab.ops.nms import nms
from terrazzo.openmmlab.ops.nms_match import nms_match
from terrazzo.openmmlab.ops.nms_quadri import nms_quadri
from terrazzo.openmmlab.ops.nms_rotated import nms_rotated
from terrazzo.openmmlab.ops.points_in_polygons import points_in_polygons_forward
from terrazzo.openmmlab.ops.prroi_pool import prroi_pool_backward, prroi_pool_coor_backward, prroi_pool_forward
from terrazzo.openmmlab.ops.psa_mask import psamask_backward, psamask_forward
from terrazzo.openmmlab.ops.riroi_align_rotated import riroi_align_rotated_backward, riroi_align_rotated_forward
from terrazzo.openmmlab.ops.roi_align import roi_align_backward, roi_align_forward
from terrazzo.openmmlab.ops.roi_align_rotated import roi_align_rotated_backward, roi_align_rotated_forward
from terrazzo.openmmlab.ops.roi_pool import roi_pool_backward, roi_pool_forward
from terrazzo.openmmlab.ops.rotated_feature_align import rotated_feature_align_backward, rotated_feature_align_forward
from terrazzo.openmmlab.ops.softnms import softnms
from terrazzo.openmmlab.ops.sync_bn import (
    sync_bn_backward_data,
    sync_bn_backward_param,
    sync_bn_forward_mean,
    sync_bn_forward_output,
    sync_bn_forward_var,
)
from terrazzo.openmmlab.ops.tin_shift import tin_shift_backward, tin_shift_forward
from terrazzo.openmmlab.ops.upfirdn2d import upfirdn2d

OPERATORS = {
    function.__name__: function
    for function in (
        active_rotated_filter_backward,
        active_rotated_filter_forward,
        bbox_overlaps,
        bias_act,
        border_align_backward,
        border_align_forward,
        box_iou_quadri,
        box_iou_rotated,
        carafe_backward,
        carafe_forward,
        carafe_naive_backward,
        carafe_naive_forward,
        chamfer_distance_backward,
        chamfer_distance_forward,
        convex_giou,
        convex_iou,
        correlation_backward,
        correlation_forward,
        deform_conv_backward_input,
        deform_conv_backward_parameters,
        deform_conv_forward,
        deform_roi_pool_backward,
        deform_roi_pool_forward,
        diff_iou_rotated_sort_vertices_forward,
        filtered_lrelu,
        filtered_lrelu_act_,
        fused_bias_leakyrelu,
        get_compiler_version,
        get_compiling_cuda_version,
        masked_col2im_forward,
        masked_im2col_forward,
        min_area_polygons,
        modulated_deform_conv_backward,
        modulated_deform_conv_forward,
        ms_deform_attn_backward,
        ms_deform_attn_forward,
        nms,
        nms_match,
        nms_quadri,
        nms_rotated,
        points_in_polygons_forward,
        prroi_pool_backward,
        prroi_pool_coor_backward,
        prroi_pool_forward,
        psamask_backward,
        psamask_forward,
        riroi_align_rotated_backward,
        riroi_align_rotated_forward,
        roi_align_backward,
        roi_align_forward,
        roi_align_rotated_backward,
        roi_align_rotated_forward,
        roi_pool_backward,
        roi_pool_forward,
        rotated_feature_align_backward,
        rotated_feature_align_forward,
        sigmoid_focal_loss_backward,
        sigmoid_focal_loss_forward,
        softmax_focal_loss_backward,
        softmax_focal_loss_forward,
        softnms,
        sync_bn_backward_data,
        sync_bn_backward_param,
        sync_bn_forward_mean,
        sync_bn_forward_output,
        sync_bn_forward_var,
        tin_shift_backward,
        tin_shift_forward,
        upfirdn2d,
    )
}
