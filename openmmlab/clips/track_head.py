"""mmdet's Mask2Former head for videos, which predicts clip after clip and follows queries from clip to clip."""

from typing import NamedTuple

import torch
from mmdet.models.tracking_heads.mask2former_track_head import Mask2FormerTrackHead
from torch import Tensor

from terrazzo.clips import aligned
from terrazzo.errors import InputError
from terrazzo.openmmlab.clips.official_names import take_official_names


class Decoded(NamedTuple):
    """What the decoder makes of clips.

    Attributes:
        classes: Logits (B, Q, classes + 1) after each layer, from the initial queries on.
        masks: Logits (B, Q, T, h, w) after each layer.
        queries: (B, Q, C) after the last layer.
        mask_feature: (B, T, C, h, w).
    """

    classes: list[Tensor]
    masks: list[Tensor]
    queries: Tensor
    mask_feature: Tensor


class ClipTrackHead(Mask2FormerTrackHead):
    """The near-online head of Axial-VS: mmdet's `Mask2FormerTrackHead`, which predicts a video clip after clip.

    It trains as mmdet's head does, on clips of `num_frames` frames. In a longer video, a query of a clip continues the
    query of the clip before that it resembles most, by the best assignment of all; class logits are the mean over
    clips. A longer video is cut into as few clips as possible, with lengths that differ by one at most.

    Args:
        options: Options of mmdet's head.

    Raises:
        InputError: The pixel decoder's clips have another length.

    Source: arXiv 2311.18537, section 3.2, and the authors' code, whose video is Tube-Link's (arXiv 2303.12782).
    """

    official_names: tuple[tuple[str, str], ...] = (
        (r"^(transformer_decoder\.layers\.\d+)\.attentions\.0\.", r"\1.cross_attn."),
        (r"^(transformer_decoder\.layers\.\d+)\.attentions\.1\.", r"\1.self_attn."),
        (r"^(transformer_decoder\.layers\.\d+)\.ffns\.0\.", r"\1.ffn."),
    )

    def __init__(self, **options):
        super().__init__(**options)
        clip, own = self.clip_frames, getattr(self.pixel_decoder, "num_frames", self.clip_frames)
        if own != clip:
            raise InputError(
                f"clips of the head have {clip} frames, pixel_decoder.num_frames is {own}: make them equal"
            )
        self.register_load_state_dict_pre_hook(take_official_names)

    @property
    def clip_frames(self) -> int:
        """Frames of a clip."""
        return self.num_frames

    def forward(self, x: tuple[Tensor, ...], data_samples: list | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Class and mask logits of videos.

        Args:
            x: The backbone's maps (B T, C, h, w). In evaluation B is 1, and T is the length of the video.
            data_samples: Not used; it is here because mmdet passes it.

        Returns:
            Logits (B, Q, classes + 1) and (B, Q, T, h, w): in training after each layer, in evaluation after the last.
        """
        if self.training:
            decoded = self.decode(x, self.num_frames)
            return decoded.classes, decoded.masks
        frames = len(x[0])
        clips = zip(*(level.tensor_split(-(-frames // self.clip_frames)) for level in x))
        classes, masks, before = [], [], None
        for clip in clips:
            decoded = self.decode(clip, len(clip[0]))
            order = slice(None) if before is None else aligned(decoded.queries[0], before)
            before = decoded.queries[0, order]
            classes.append(decoded.classes[-1][:, order])
            masks.append(decoded.masks[-1][:, order])
        return [torch.stack(classes).mean(0)], [torch.cat(masks, 2)]

    def decode(self, x: tuple[Tensor, ...], frames: int) -> Decoded:
        """Decode clips: mmdet's `forward`, which also gives queries and takes the length of clips.

        Args:
            x: The backbone's maps (B T, C, h, w), batch-major.
            frames: T.
        """
        mask_feature, memories = self.pixel_decoder(x)
        mask_feature = mask_feature.unflatten(0, (-1, frames))
        keys, positions = zip(*(self._memory(level, memory, frames) for level, memory in enumerate(memories)))
        query, placed = (
            embedding.weight.expand(len(mask_feature), -1, -1) for embedding in (self.query_feat, self.query_embed)
        )
        sizes = [memory.shape[-2:] for memory in memories]
        outputs = [self._forward_head(query, mask_feature, sizes[0])]
        for index, layer in enumerate(self.transformer_decoder.layers):
            level, mask = index % len(sizes), outputs[-1][2]
            mask = mask & ~mask.all(-1, keepdim=True)  # a query that sees nothing sees everything
            query = layer(
                query=query,
                key=keys[level],
                value=keys[level],
                query_pos=placed,
                key_pos=positions[level],
                cross_attn_mask=mask,
                query_key_padding_mask=None,
                key_padding_mask=None,
            )
            outputs.append(self._forward_head(query, mask_feature, sizes[(index + 1) % len(sizes)]))
        classes, masks, _ = zip(*outputs)
        return Decoded(list(classes), list(masks), query, mask_feature)

    def _memory(self, level: int, memory: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """The keys of a level, and their positions, (B, T h w, C)."""
        memory = self.decoder_input_projs[level](memory).unflatten(0, (-1, frames))  # B T C h w
        nowhere = memory.new_zeros((len(memory), frames, *memory.shape[-2:]), dtype=torch.bool)
        position = self.decoder_positional_encoding(nowhere)
        keys, position = (x.permute(0, 1, 3, 4, 2).flatten(1, 3) for x in (memory, position))
        return keys + self.level_embed.weight[level], position
