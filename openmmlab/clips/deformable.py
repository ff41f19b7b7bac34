"""Deformable attention inside frames, and axial trajectory attention between the frames of a clip."""

from typing import Any

import torch
from mmcv.ops.multi_scale_deform_attn import (
    IS_CUDA_AVAILABLE,
    MultiScaleDeformableAttention,
    MultiScaleDeformableAttnFunction,
    multi_scale_deformable_attn_pytorch,
)
from mmdet.models.layers.transformer.mask2former_layers import Mask2FormerTransformerEncoder
from torch import Tensor, nn

from terrazzo.clips import AxialTrajectoryEncoder

HEADS = 8
"""Heads of the trajectory attention, however many the deformable attention has, as in the authors' code."""


class AxialTrajectoryDeformableAttention(MultiScaleDeformableAttention):
    """Multi-scale deformable attention whose samples mix with samples of other frames, before the last projection.

    On each of the first levels, f becomes f + gamma TE(f), where TE is an `AxialTrajectoryEncoder` over the frames of a
    clip. With gamma = 0, this is mmcv's deformable attention.

    Args:
        num_temporal_levels: Number of levels, from the lowest resolution, that mix frames.
        num_temporal_layers: Layers of TE.
        num_temporal_dim: Hidden channels of TE's perceptrons.
        attn_drop: Dropout of the outputs of TE's attentions.
        skip_connect: Whether gamma TE(f) is added to f; otherwise TE(f) replaces f.
        options: Options of mmcv's `MultiScaleDeformableAttention`; `batch_first` is True.

    Source: arXiv 2311.18537, section 3.2; `MultiScaleDeformableAxialTrajectoryAttention` of the authors' code.
    """

    def __init__(
        self,
        num_temporal_levels: int = 2,
        num_temporal_layers: int = 1,
        num_temporal_dim: int = 1024,
        attn_drop: float = 0.0,
        skip_connect: bool = True,
        **options,
    ):
        super().__init__(**{**options, "batch_first": True})
        channels = self.value_proj.out_features
        self.num_temporal_levels = num_temporal_levels
        self.temporal_layer = AxialTrajectoryEncoder(num_temporal_layers, channels, num_temporal_dim, HEADS, attn_drop)
        self.gamma = nn.Parameter(self.value_proj.weight.new_full((channels,), 1e-6)) if skip_connect else None

    def forward(
        self,
        query: Tensor,
        query_pos: Tensor,
        query_pos3d: list[Tensor],
        reference_points: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
        key_padding_mask: Tensor | None = None,
        **unused,
    ) -> Tensor:
        """Attend inside frames, and mix frames; no pixel is padding.

        Args:
            query: (B T, N, C), the pixels of all levels, from low to high resolution.
            query_pos: (B T, N, C), added to `query` before offsets and weights are computed.
            query_pos3d: For each temporal level, positions (1, T, H, W, C) of its pixels in the clip.
            reference_points: (B T, N, levels, 2), x and y from 0 to 1.
            spatial_shapes: (levels, 2), rows and columns.
            level_start_index: (levels,), the first pixel of each level.

        Returns:
            (B T, N, C), with `query` added.
        """
        count, heads, points = query.shape[1], self.num_heads, self.num_points
        placed, value = query + query_pos, self.value_proj(query).unflatten(-1, (heads, -1))
        offsets = self.sampling_offsets(placed).view(len(query), count, heads, self.num_levels, points, 2)
        weights = self.attention_weights(placed).unflatten(-1, (heads, -1)).softmax(-1)
        weights = weights.view(len(query), count, heads, self.num_levels, points)
        locations = reference_points[:, :, None, :, None] + offsets / spatial_shapes.flip(-1)[:, None]
        if IS_CUDA_AVAILABLE and value.is_cuda:
            sampled = MultiScaleDeformableAttnFunction.apply(
                value, spatial_shapes, level_start_index, locations, weights, self.im2col_step
            )
        else:
            sampled = multi_scale_deformable_attn_pytorch(value, spatial_shapes, locations, weights)
        return query + self.dropout(self.output_proj(self._mixed(sampled, spatial_shapes, query_pos3d)))

    def _mixed(self, x: Tensor, spatial_shapes: Tensor, positions: list[Tensor]) -> Tensor:
        """The samples (B T, N, C); on temporal levels, they are mixed with samples of other frames."""
        levels = list(x.split(spatial_shapes.prod(1).tolist(), 1))
        for index, position in enumerate(positions):
            mixed = self.temporal_layer(levels[index], position)
            levels[index] = mixed if self.gamma is None else levels[index] + self.gamma * mixed
        return torch.cat(levels, 1)


class ClipEncoder(Mask2FormerTransformerEncoder):
    """The encoder of mmdet's pixel decoder, whose attention also mixes frames.

    Args:
        temporal: Options of `AxialTrajectoryDeformableAttention` that mmcv's attention does not have.
        options: Options of mmdet's encoder.

    Attributes:
        positions: For each temporal level, positions (1, T, H, W, C) of its pixels in their clip, for the next call.
            They are kept here because mmdet's pixel decoder does not pass them to its encoder.
    """

    positions: list[Tensor]

    def __init__(self, temporal: dict[str, Any], **options):
        super().__init__(**options)
        for layer in self.layers:
            layer.self_attn = AxialTrajectoryDeformableAttention(**layer.self_attn_cfg, **temporal)

    def forward(self, **given) -> Tensor:
        """Encode as mmdet's encoder does, with `positions`."""
        return super().forward(query_pos3d=self.positions, **given)
