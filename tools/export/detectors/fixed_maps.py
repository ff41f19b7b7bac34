"""Deformable attention over maps of known sizes, so that its graph does not depend on them.

mmdet passes the sizes of maps as tensors, and slices and reshapes by their values. In a graph these values would be
unknown; here they are plain numbers.
"""

import copy
from collections.abc import Sequence

import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention, multi_scale_deformable_attn_pytorch
from mmdet.models.layers import MSDeformAttnPixelDecoder
from torch import Tensor, nn
from torch.nn.functional import interpolate

Shapes = Sequence[tuple[int, int]]
"""Height and width of each map."""


def with_fixed_maps(model: nn.Module) -> nn.Module:
    """A copy of a model, with the same parameters, in which deformable attention takes `Shapes` for sizes.

    A model without deformable attention is returned as it is.
    """
    if not any(type(part) in (MultiScaleDeformableAttention, MSDeformAttnPixelDecoder) for part in model.modules()):
        return model
    shared = {id(value): value for value in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is MultiScaleDeformableAttention:
                setattr(parent, name, FixedAttention(child))
            elif type(child) is MSDeformAttnPixelDecoder:
                setattr(parent, name, FixedPixelDecoder(child))
    return model


class FixedAttention(nn.Module):
    """mmcv's `MultiScaleDeformableAttention` at inference, with sizes that are plain numbers.

    Args:
        attention: the module that provides the layers.
    """

    def __init__(self, attention: MultiScaleDeformableAttention):
        super().__init__()
        self.attention = attention

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Shapes = (),
        **ignored,
    ) -> Tensor:
        """As `MultiScaleDeformableAttention.forward`, except for `spatial_shapes`."""
        own = self.attention
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not own.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        value = own.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask[..., None], 0.0)
        value = value.unflatten(2, (own.num_heads, -1))
        samples = (own.num_heads, own.num_levels, own.num_points)
        offsets = own.sampling_offsets(query).unflatten(2, (*samples, 2))
        weights = own.attention_weights(query).unflatten(2, (own.num_heads, -1)).softmax(-1).unflatten(3, samples[1:])
        points = reference_points[:, :, None, :, None]  # B N 1 levels 1, and 2 or 4
        if reference_points.shape[-1] == 2:
            extents = query.new_tensor([(width, height) for height, width in spatial_shapes])
            places = points + offsets / extents[:, None]
        else:
            places = points[..., :2] + offsets / own.num_points * points[..., 2:] * 0.5
        output = own.output_proj(multi_scale_deformable_attn_pytorch(value, spatial_shapes, places, weights))
        return (output if own.batch_first else output.transpose(0, 1)) + identity


class FixedPixelDecoder(nn.Module):
    """mmdet's `MSDeformAttnPixelDecoder` with sizes that are plain numbers.

    Args:
        decoder: the module that provides the layers.
    """

    def __init__(self, decoder: MSDeformAttnPixelDecoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, feats: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """From maps (B, C, H, W), fine to coarse, to the map of mask features, and maps from coarse to fine."""
        own, batch = self.decoder, feats[0].shape[0]
        deformed = feats[::-1][: own.num_encoder_levels]  # coarse to fine
        shapes = [tuple(level.shape[-2:]) for level in deformed]
        inputs, positions, points = [], [], []
        for index, (level, (height, width)) in enumerate(zip(deformed, shapes)):
            number = own.num_input_levels - index - 1
            position = own.postional_encoding(level.new_zeros((batch, height, width), dtype=torch.bool))
            position = position + own.level_encoding.weight[index].view(1, -1, 1, 1)
            point = own.point_generator.single_level_grid_priors((height, width), number, device=level.device)
            inputs.append(own.input_convs[index](level).flatten(2).transpose(1, 2))
            positions.append(position.flatten(2).transpose(1, 2))
            points.append(point / (point.new_tensor([width, height]) * own.strides[number]))
        points = torch.cat(points)[None, :, None].repeat(batch, 1, own.num_encoder_levels, 1)
        memory = own.encoder(
            query=torch.cat(inputs, dim=1),
            query_pos=torch.cat(positions, dim=1),
            key_padding_mask=None,  # mmdet's says that nothing is padding
            spatial_shapes=shapes,
            reference_points=points,
            level_start_index=None,
            valid_ratios=None,
        )
        parts = memory.split([height * width for height, width in shapes], dim=1)
        maps = [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, shapes)]
        for number in reversed(range(own.num_input_levels - own.num_encoder_levels)):
            beside = own.lateral_convs[number](feats[number])
            coarse = interpolate(maps[-1], size=beside.shape[-2:], mode="bilinear", align_corners=False)
            maps.append(own.output_convs[number](beside + coarse))
        return own.mask_feature(maps[-1]), maps[: own.num_outs]
