"""LV-ViT, a host of AS-ViT: a convolutional stem, halved residual branches, a second classifier on patches."""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, calculate_drop_path_rates
from timm.models.vision_transformer import Block
from torch import nn

from terrazzo.backbones._head import TokenHead
from terrazzo.backbones._layers import init_linear, patch_conv, whole_patches
from terrazzo.backbones._plain import PlainViT
from terrazzo.backbones._tokens import Reducer

SMALL = dict(embed_dim=384, num_heads=6, depth=16)
MEDIUM = dict(embed_dim=512, num_heads=8, depth=20)

_norm_layer = partial(LayerNorm, eps=1e-5)


class Half(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


class ConvPatches(nn.Module):
    """Three convolutions at half the size, then patches of 8: (B, in_chans, H, W) to (B, C, H/16, W/16)."""

    def __init__(self, in_chans: int, dim: int, width: int = 64, **factory):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(width, **factory)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(width, **factory)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False, **factory)
        self.bn3 = nn.BatchNorm2d(width, **factory)
        self.proj = patch_conv(width, dim, 8, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        return self.proj(whole_patches(x, 8))


class TwoHeads(TokenHead):
    """The class token's logits, plus half of a second classifier's largest logits over the patches."""

    def _fit(self, num_classes: int, pool_type: str, **factory) -> None:
        super()._fit(num_classes, pool_type, **factory)
        self.aux = nn.Linear(self.in_features, num_classes, **factory) if self.has_second() else nn.Identity()

    def has_second(self) -> bool:
        return self.token and not isinstance(self.fc, nn.Identity)

    def separate(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return super().forward(x), self.aux(self.positions(x)) if self.has_second() else None

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        if pre_logits:
            return super().forward(x, pre_logits=True)
        out, patches = self.separate(x)
        return out if patches is None else out + 0.5 * patches.amax(1)


class LVViT(PlainViT):
    """LV-ViT, run by a reducer.

    Source: arXiv 2104.10858, in the form that AS-ViT uses (arXiv 2209.13802).
    """

    def __init__(
        self,
        reducer: Reducer,
        embed_dim: int = 384,
        num_heads: int = 6,
        depth: int = 16,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        global_pool: str = "token",
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ):
        """Args:
        **kwargs: restore, full_last, grid, norm_outputs: see `PlainViT`.
        """
        factory = dict(device=device, dtype=dtype)
        units = [
            Block(embed_dim, num_heads, mlp_ratio=3, drop_path=rate, norm_layer=_norm_layer, **factory)
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        ]
        for block in units:
            block.ls1, block.ls2 = Half(), Half()
        super().__init__(
            ConvPatches(in_chans, embed_dim, **factory),
            units,
            embed_dim,
            reducer,
            norm_layer=_norm_layer,
            in_chans=in_chans,
            global_pool=global_pool,
            num_classes=num_classes,
            drop_rate=drop_rate,
            **factory,
            **kwargs,
        )
        self.head = TwoHeads(embed_dim, num_classes, global_pool, drop_rate, **factory)
        self.apply(init_linear)


# From the authors' names to ours.
NAMES = [
    (r"^(?=cls_token|pos_embed)", "stem."),
    (r"^patch_embed\.", "stem.patches."),
    (r"^head\.(?=weight|bias)", "head.fc."),
    (r"^aux_head\.", "head.aux."),
]
