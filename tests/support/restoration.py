"""What the tests of restoration share: a tiny registered network, a small encoder, and pictures."""

import numpy as np
import torch
from PIL import Image
from timm.models import register_model
from torch import Tensor, nn

TINY = "tiny_restorer"
"""A restoration network of two convolutions, registered with timm."""

SMALL = dict(name="resnet10t", out_indices=(1, 2, 3, 4))
"""A small pyramid."""


SMALL_NETWORKS = {
    "mtair": dict(
        dim=8,
        num_blocks=(1, 1, 1, 1),
        num_refinement_blocks=1,
        heads=(1, 2, 4, 4),
        prompt_dims=(4, 6, 8, 8),
        prompt_sizes=(16, 8, 4, 2),
    ),
    "rgt": dict(depth=(3, 2), embed_dim=24, num_heads=2, split_size=(4, 8)),
}
"""Arguments that make a family's networks small, by family; another family is tested at its own size."""

WITHOUT_GRADIENT = {"rgt": ".pos."}
"""Parts of names, by family: what has no gradient in so small a network, such as a norm of one channel."""


class TinyRestorer(nn.Module):
    """The picture, each pixel repeated `scale` times, plus what two convolutions add."""

    def __init__(self, scale: int):
        super().__init__()
        self.upscale = scale
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Sequential(nn.Conv2d(8, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))
        self.pretrained_cfg = {}

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.upscale, 2).repeat_interleave(self.upscale, 3) + 0.1 * self.second(
            torch.relu(self.first(x))
        )


@register_model
def tiny_restorer(pretrained=False, scale=2, **kwargs):
    return TinyRestorer(scale)


def write_pictures(root, size=(52, 40)):
    """Write images/{train,val}: two smooth pictures with some noise each; the root."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        for index in range(2):
            coarse = Image.fromarray(random.integers(0, 255, (5, 6, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(int)
            pixels = np.clip(pixels + random.integers(-12, 12, pixels.shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "images" / split / f"{index}.png")
    return root
