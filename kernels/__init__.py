"""Operators: each has a reference that defines it, a portable form that runs everywhere, and a fused form in Triton."""

from terrazzo.kernels.attentive_conv import attentive_conv as attentive_conv
from terrazzo.kernels.block_sparse_attention import block_sparse_attention as block_sparse_attention
from terrazzo.kernels.dispatch.backend import use_backend as use_backend
from terrazzo.kernels.grouped_linear import grouped_linear as grouped_linear
from terrazzo.kernels.neighborhood_attention import neighborhood_attention as neighborhood_attention
from terrazzo.kernels.selective_scan import selective_scan as selective_scan
from terrazzo.kernels.selective_scan import selective_scan_2d as selective_scan_2d
from terrazzo.kernels.softmax_free_attention import softmax_free_attention as softmax_free_attention
from terrazzo.kernels.ssd import ssd as ssd
from terrazzo.kernels.strip_attention import strip_attention as strip_attention
from terrazzo.kernels.varlen_attention import varlen_attention as varlen_attention

__all__ = [
    "attentive_conv",
    "block_sparse_attention",
    "grouped_linear",
    "neighborhood_attention",
    "selective_scan",
    "selective_scan_2d",
    "softmax_free_attention",
    "ssd",
    "strip_attention",
    "use_backend",
    "varlen_attention",
]
