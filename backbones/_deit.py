"""DeiT, the host of several reducing families: its sizes, the URLs of its weights, and their names."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm, calculate_drop_path_rates, resample_abs_pos_embed
from timm.models.vision_transformer import Block

from terrazzo.backbones._layers import init_linear, patch_conv
from terrazzo.backbones._plain import PlainViT
from terrazzo.backbones._registration import imagenet_cfg
from terrazzo.backbones._tokens import Reducer
from terrazzo.backbones._weights import rename

TINY, SMALL, BASE = (dict(embed_dim=64 * heads, num_heads=heads) for heads in (3, 6, 12))

_norm_layer = partial(LayerNorm, eps=1e-6)


class DeiT(PlainViT):
    """DeiT with timm's blocks, run by a reducer.

    Source: arXiv 2012.12877.
    """

    def __init__(
        self,
        reducer: Reducer,
        embed_dim: int = 192,
        num_heads: int = 3,
        depth: int = 12,
        patch_size: int = 16,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ):
        """Args:
        **kwargs: restore, full_last, window, global_blocks, grid, num_classes, global_pool, drop_rate, norm_outputs:
            see `PlainViT`.
        """
        factory = dict(device=device, dtype=dtype)
        units = [
            Block(embed_dim, num_heads, qkv_bias=True, drop_path=rate, norm_layer=_norm_layer, **factory)
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        ]
        patches = patch_conv(in_chans, embed_dim, patch_size, **factory)
        super().__init__(
            patches,
            units,
            embed_dim,
            reducer,
            norm_layer=_norm_layer,
            in_chans=in_chans,
            reduction=patch_size,
            **factory,
            **kwargs,
        )
        self.apply(init_linear)


# From DeiT's and timm's names to ours.
NAMES = [
    (r"^(?=cls_token|pos_embed)", "stem."),
    (r"^patch_embed\.proj\.", "stem.patches."),
    (r"^head\.(?=weight|bias)", "head.fc."),
]


def from_official(
    checkpoint: dict[str, Any], model: PlainViT, names: Iterable[tuple[str, str]] = NAMES
) -> dict[str, torch.Tensor]:
    """Turn a checkpoint of a plain ViT, by default DeiT's or timm's, into a state dict of `model`.

    Positions of another grid are resized, as the model resizes them for images of other sizes.

    Args:
        names: pairs of a regular expression and a replacement.
    """
    state_dict = rename(checkpoint, names)
    positions, own = state_dict.get("stem.pos_embed"), model.stem.pos_embed
    if positions is not None and positions.shape[1] != own.shape[1]:
        state_dict["stem.pos_embed"] = resample_abs_pos_embed(positions, list(model.stem.grid))
    return state_dict


WEIGHTS = {
    "tiny": "https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth",
    "small": "https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth",
    "base": "https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth",
}


def cfg(size: str, top1: str, **kwargs) -> dict[str, Any]:
    """timm's configuration of a family on DeiT; the weights are DeiT's, Apache-2.0."""
    return imagenet_cfg(
        top1, url=WEIGHTS[size], pool_size=(14, 14), first_conv="stem.patches", license="apache-2.0", **kwargs
    )
