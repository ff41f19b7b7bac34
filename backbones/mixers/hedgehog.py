"""Hedgehog: linear attention with a learned feature map that imitates softmax.

Paper: The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry, ICLR 2024, arXiv 2402.04347.
LinVideo (arXiv 2510.08318) chose this feature map for models of video.
"""

import torch
from torch import nn

from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._mixer import Host, Mixer


class Hedgehog(Mixer):
    """out = f(q) (f(k)^T v) / f(q) (f(k)^T 1), with f(x) = [softmax(x W / D^(1/4)), softmax(-x W / D^(1/4))].

    W is D x D for each head, one for queries and one for keys, and begins as the identity. The cost is linear in N, and
    the order of tokens does not matter. A merged token counts as often as the patches that it stands for. Sums over
    tokens are in float32 at least.

    Source: arXiv 2402.04347, section 4.1, equation 6.
    """

    needs_grid = False

    def __init__(self, host: Host, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__(host)
        eye = torch.eye(host.head_dim, device=device, dtype=dtype)
        self.query_map = nn.Parameter(eye.repeat(host.heads, 1, 1))
        self.key_map = nn.Parameter(eye.repeat(host.heads, 1, 1))

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        query, key = features(query, self.query_map), features(key, self.key_map)
        if place.size is not None:
            key = key * place.size[:, None, :, None].to(key.dtype)
        summed = key.transpose(2, 3) @ value.to(key.dtype)  # B heads 2D D
        total = key.sum(2).unsqueeze(3)  # B heads 2D 1
        return ((query @ summed) / (query @ total)).to(value.dtype)

    def weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        query, key = features(query, self.query_map), features(key, self.key_map)
        if place.size is not None:
            key = key * place.size[:, None, :, None].to(key.dtype)
        found = query @ key.transpose(2, 3)
        return found / found.sum(-1, keepdim=True)


def features(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Hedgehog's feature map (B, heads, N, D) to (B, heads, N, 2D), in float32 at least; rows sum to 2."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    mapped = (x.to(dtype) * x.shape[-1] ** -0.25) @ weight.to(dtype)
    return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], -1)
