"""mmdet's pixel decoder of Mask2Former, for clips: its encoder also mixes the frames of a clip."""

from typing import Any

import torch
from mmdet.models.layers import MSDeformAttnPixelDecoder
from torch import Tensor, nn

from terrazzo.clips import positions_3d
from terrazzo.errors import InputError
from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.openmmlab.clips.deformable import ClipEncoder
from terrazzo.openmmlab.clips.official_names import take_official_names


class AxialTrajectoryPixelDecoder(MSDeformAttnPixelDecoder):
    """The within-clip module of Axial-VS: mmdet's `MSDeformAttnPixelDecoder` with axial trajectory attention.

    It takes that decoder's place in any config of mmdet. Official checkpoints load, and so do mmdet's Mask2Former
    checkpoints for single images, which leave the temporal parts as they are (with gamma near 0).

    Args:
        num_frames: T, frames of a clip. Frames beyond the last full clip are a clip of their own.
        num_temporal_levels, num_temporal_layers, num_temporal_dim, attn_drop, skip_connect: See
            `AxialTrajectoryDeformableAttention`.
        options: Options of mmdet's pixel decoder.

    Raises:
        InputError: `num_frames` is less than 1, or there are more temporal levels than levels.

    Source: arXiv 2311.18537, section 3.2.
    """

    official_names = (
        (r"^(encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
        (r"^(encoder\.layers\.\d+)\.ffns\.0\.", r"\1.ffn."),
    )

    def __init__(
        self,
        *,
        num_frames: int,
        num_temporal_levels: int = 2,
        num_temporal_layers: int = 1,
        num_temporal_dim: int = 1024,
        attn_drop: float = 0.0,
        skip_connect: bool = True,
        encoder: dict[str, Any],
        feat_channels: int = 256,
        **options,
    ):
        super().__init__(encoder=encoder, feat_channels=feat_channels, **options)
        if num_frames < 1:
            raise InputError(f"num_frames must be at least 1, got {num_frames}")
        if not 0 <= num_temporal_levels <= self.num_encoder_levels:
            raise InputError(
                f"num_temporal_levels must be 0 to {self.num_encoder_levels}, the decoder's levels, "
                f"got {num_temporal_levels}"
            )
        self.num_frames, self.num_temporal_levels = num_frames, num_temporal_levels
        temporal = dict(
            num_temporal_levels=num_temporal_levels,
            num_temporal_layers=num_temporal_layers,
            num_temporal_dim=num_temporal_dim,
            attn_drop=attn_drop,
            skip_connect=skip_connect,
        )
        self.encoder = ClipEncoder(temporal, **encoder)
        self.level_3d_encodeing = nn.Embedding(num_temporal_levels, feat_channels)  # the authors' spelling
        self.register_load_state_dict_pre_hook(take_official_names)

    def init_weights(self) -> None:
        """Initialize as the authors do: as mmdet, but with random offsets and weights of the deformable attention."""
        super().init_weights()
        for parameter in self.encoder.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_normal_(parameter)

    def forward(self, feats: list[Tensor], num_frames: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """Decode as mmdet's decoder does, for frames of clips.

        Args:
            feats: Maps (B T, C, h, w) of each level, from high to low resolution.
            num_frames: T; by default, the decoder's own.

        Returns:
            The mask feature (B T, C, H / 4, W / 4), and maps of three levels, from low to high resolution.
        """
        count = len(feats[0])
        frames = min(num_frames or self.num_frames, count)
        whole = count // frames * frames
        if whole < count:
            first, last = self([x[:whole] for x in feats], frames), self([x[whole:] for x in feats], frames)
            return torch.cat([first[0], last[0]]), [torch.cat(pair) for pair in zip(first[1], last[1])]
        self.encoder.positions = [
            self._positions(level, frames, feats[-1 - level]) for level in range(self.num_temporal_levels)
        ]
        return super().forward(feats)

    def _positions(self, level: int, frames: int, like: Tensor) -> Tensor:
        """The positions (1, T, h, w, C) of the pixels of a level in their clip."""
        embedding = self.level_3d_encodeing.weight[level]
        height, width = like.shape[2:]
        dtype = accumulator(like)  # the sines need it
        position = positions_3d(frames, height, width, len(embedding), device=like.device, dtype=dtype)
        return (position + embedding).to(embedding.dtype)[None]
