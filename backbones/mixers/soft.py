"""SOFT and SOFT++: a Gaussian kernel in place of softmax, by its low-rank form with landmarks.

Papers: SOFT: Softmax-free Transformer with Linear Complexity, NeurIPS 2021, arXiv 2110.11945; Softmax-free Linear
Transformers (SOFT++), IJCV 2024, arXiv 2207.03341. Official code: github.com/fudan-zvg/SOFT (MIT).
"""

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.backbones._layers import WideLayerNorm
from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._local import depthwise
from terrazzo.backbones.mixers._mixer import Host, Mixer
from terrazzo.errors import InputError
from terrazzo.kernels import softmax_free_attention
from terrazzo.kernels.dispatch import arguments
from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast
from terrazzo.kernels.softmax_free_attention import check_scope


class Soft(Mixer):
    """out = G(q, l) A (G(q, l)^T v) + convolution of v, with G(x, y) = exp(-|x - y|^2 / (2 sqrt(D))).

    The landmarks l are GELU(LN(convolution of the map of queries, with kernel and stride `ratio`)), with the same
    weights for all heads. A is nearly the inverse of G(l, l): 20 steps of Newton's iteration, which define the result
    where they do not converge. SOFT adds 0.01 to the diagonal first, and its gradient is that of the inverse. SOFT++
    scales the result by the root of G's row sums on both sides, and its gradient goes through the steps. The
    convolution of v is depthwise, with one kernel for each head.

    As published, keys are the queries, and the host's keys are not read. Tokens in front count like patches, but give
    no landmarks and are not convolved. There are m = N / ratio^2 landmarks, so a head costs 4 N m D + 40 m^3: use a
    larger ratio for large maps. All of it is in float32 at least. Maps smaller than `ratio` have softmax attention.

    Source: arXiv 2110.11945, section 3, and arXiv 2207.03341, section 3.
    """

    def __init__(
        self,
        host: Host,
        norm: bool = False,
        ratio: int = 2,
        kernel: int = 3,
        alpha_scope: str = "matrix",
        shared: bool = True,
        sampling: str = "conv",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Args:
        norm: False for SOFT, True for SOFT++.
        ratio: Side of the patches that give a landmark. The paper's stages have 8, 4 and 2.
        kernel: Side of the kernel that convolves values, odd. The paper's stages have 9, 5 and 3.
        alpha_scope: For SOFT++: whether each "matrix" has its own start of the iteration, or, as in the official code,
            the whole batch has one ("global"), so that an image's result depends on its neighbours in the batch.
        shared: Whether queries serve as keys. If not, the host's keys have the second kernel, and as many landmarks of
            their own are added (our extension).
        sampling: "conv", or "mean": landmarks are means of `ratio` x `ratio` queries, without parameters (ours). With
            "conv" the landmarks lie far from a pretrained ViT's queries at the start: in DINOv2 the result is 1e-8 of
            softmax attention's, and gradients are as small. "mean" with `norm` begins with results of the right size.
        """
        super().__init__(host)
        self.norm, self.ratio = bool(norm), arguments.whole(ratio, "ratio", 1)
        self.alpha_scope, self.shared = check_scope(alpha_scope), shared
        kernel = arguments.whole(kernel, "kernel")
        if kernel < 1 or kernel % 2 == 0:
            raise InputError(f"kernel must be an odd number, got {kernel}")
        if sampling not in ("conv", "mean"):
            raise InputError(f"sampling must be 'conv' or 'mean', got {sampling!r}")
        factory, heads, dim = dict(device=device, dtype=dtype), host.heads, host.head_dim
        self.Qlandmark_op = None
        if sampling == "conv":
            self.Qlandmark_op = nn.Conv2d(dim, dim, self.ratio, stride=self.ratio, bias=False, **factory)
            self.Qnorm_act = nn.Sequential(WideLayerNorm(dim, eps=1e-5, **factory), nn.GELU())
        self.conv = nn.Conv2d(heads, heads, kernel, padding=kernel // 2, groups=heads, bias=False, **factory)

    def dense(self, grid: tuple[int, int], prefix: int) -> str | None:
        return f"a side of the map is less than ratio {self.ratio}" if min(grid) < self.ratio else None

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        dtype, scale = accumulator(query, key, value), query.shape[-1] ** -0.25
        with without_autocast(value):
            query, wide = query.to(dtype) * scale, value.to(dtype)
            landmarks = self.landmarks(query, place)
            if self.shared:
                key = None
            else:
                key = key.to(dtype) * scale
                landmarks = torch.cat([landmarks, self.landmarks(key, place)], 2)
            out = softmax_free_attention(query, wide, landmarks, key, self.norm, self.alpha_scope)
            weight = self.conv.weight.repeat_interleave(wide.shape[3], 0)
            return (out + depthwise(wide, place, weight)).to(value.dtype)

    def landmarks(self, query: torch.Tensor, place: Place) -> torch.Tensor:
        """Landmarks (B, heads, m, D) of scaled queries (B, heads, N, D)."""
        maps = query[:, :, place.prefix :].flatten(0, 1).transpose(1, 2).unflatten(2, place.grid)
        if self.Qlandmark_op is None:
            return F.avg_pool2d(maps, self.ratio).flatten(2).transpose(1, 2).unflatten(0, query.shape[:2])
        cells = F.conv2d(maps, self.Qlandmark_op.weight.to(query.dtype), stride=self.ratio)
        return self.Qnorm_act(cells.flatten(2).transpose(1, 2)).unflatten(0, query.shape[:2])
