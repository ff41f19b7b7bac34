"""The head of Axial-VS for whole videos: it corrects the queries of all clips together."""

import torch
from torch import Tensor, nn

from terrazzo.clips import CrossClipTracker, aligned
from terrazzo.errors import InputError
from terrazzo.openmmlab.clips.track_head import ClipTrackHead


class CrossClipTrackHead(ClipTrackHead):
    """The offline head of Axial-VS: a frozen `ClipTrackHead` decodes clips, and a tracker corrects their queries.

    Only the tracker and the heads for classes and masks are trained: start from the weights of a trained
    `ClipTrackHead`, and freeze the backbone. In evaluation the last frame of a video is repeated to fill the last clip.

    Args:
        num_frames: Frames of a video in training: `num_clips` clips of equal length.
        num_clips: Clips of a video in training.
        num_cross_clip_layers: Layers of the tracker.
        trajectory_dropout: Dropout of the weights of the tracker's attention.
        aspp_dropout: Dropout behind the tracker's convolutions.
        options: Options of mmdet's head.

    Raises:
        InputError: `num_clips` does not divide `num_frames`, or the pixel decoder's clips have another length.

    Source: arXiv 2311.18537, section 3.3; `Mask2FormerVideoCCHeadTube` of the authors' code.
    """

    official_names = (
        *ClipTrackHead.official_names,
        (r"^(?=transformer_trajectory_self_attention_layers\.|conv_short_aggregate_layers\.|conv_norms\.)", "tracker."),
    )

    def __init__(
        self,
        *,
        num_frames: int,
        num_clips: int,
        feat_channels: int = 256,
        num_cross_clip_layers: int = 4,
        trajectory_dropout: float = 0.1,
        aspp_dropout: float = 0.1,
        **options,
    ):
        if num_clips < 1 or num_frames % num_clips:
            raise InputError(f"num_clips must divide num_frames={num_frames}, got {num_clips}")
        self.num_clips = num_clips
        super().__init__(num_frames=num_frames, feat_channels=feat_channels, **options)
        self.tracker = CrossClipTracker(
            num_cross_clip_layers, feat_channels, dropout=aspp_dropout, attention_dropout=trajectory_dropout
        )
        self.activation_proj = nn.Linear(feat_channels, 1)
        for part in self._frozen():
            part.requires_grad_(False)

    @property
    def clip_frames(self) -> int:
        """Frames of a clip."""
        return self.num_frames // self.num_clips

    def _frozen(self) -> list[nn.Module]:
        return [
            *(self.pixel_decoder, self.decoder_input_projs, self.transformer_decoder),
            *(self.query_embed, self.query_feat, self.level_embed),
        ]

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode as PyTorch does; frozen parts stay in evaluation."""
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self

    def forward(self, x: tuple[Tensor, ...], data_samples: list | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Class and mask logits of videos, as `ClipTrackHead` returns them; the layers are the tracker's."""
        frames = self.num_frames if self.training else len(x[0])
        videos = [level.unflatten(0, (-1, frames)) for level in x]
        decoded = [self._clips([level[index] for level in videos]) for index in range(len(videos[0]))]
        queries, features = (torch.stack(parts) for parts in zip(*decoded))  # B clips Q C; B frames C h w
        layers = self.tracker(queries)
        classes, masks = [], []
        for layer in layers if self.training else layers[-1:]:
            layer = self.transformer_decoder.post_norm(layer)
            share = self.activation_proj(layer).softmax(1)
            classes.append(self.cls_embed((layer * share).sum(1)))
            embedded = self.mask_embed(layer)
            clips = zip(embedded.unbind(1), features.split(self.clip_frames, 1))
            masks.append(torch.cat([torch.einsum("bqc,btchw->bqthw", *clip) for clip in clips], 2))
        return classes, masks

    @torch.no_grad()
    def _clips(self, video: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The queries (clips, Q, C) of a video's clips, in one order, and the mask feature (T, C, h, w)."""
        frames, queries, features = len(video[0]), [], []
        for start in range(0, frames, self.clip_frames):
            index = torch.arange(start, start + self.clip_frames, device=video[0].device).clamp(max=frames - 1)
            decoded = self.decode(tuple(level[index] for level in video), self.clip_frames)
            features.append(decoded.mask_feature[0])
            found = decoded.queries[0]
            queries.append(found[aligned(found, queries[-1])] if queries else found)
        return torch.stack(queries), torch.cat(features)[:frames]
