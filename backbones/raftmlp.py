"""RaftMLP: a pyramid of MLPs that mix whole columns and rows of a map, several channels ("rafts") at a time.

Paper: RaftMLP: How Much Can Be Done Without Attention and with Less Spatial Locality?, ACCV 2022, arXiv 2108.04384.
Official code: github.com/okojoalg/raft-mlp, Apache-2.0. The repository publishes no weights.

The MLPs have the size of the map that they were made for (`img_size`). As in the official code, blocks resize maps of
other images bicubically to this size and back, and a level first resizes its input to whole patches.

Differences without effect on outputs: the norms before the MLPs store their channels in the order of the map (official
checkpoints have the order within a raft, and are converted); the embedding's patches of several sizes are one
convolution, with its weights added up. Drop path is 0 by default; the authors' rate is in the configs. The paper's
baseline (MLP-Mixer, which timm has) and a head that reads all levels, which no published setting has, are left out.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from terrazzo.backbones._bare import is_bare
from terrazzo.backbones._checks import sides, whole, wholes
from terrazzo.backbones._layers import resized
from terrazzo.backbones._pyramid import Pyramid, Stage
from terrazzo.backbones._registration import imagenet_cfg, register_variants
from terrazzo.backbones._states import Beside
from terrazzo.backbones._weights import any_prefix, rename
from terrazzo.errors import InputError
from terrazzo.kernels.dispatch.exporting import is_exporting

__all__ = ["RaftMLP"]

_norm_layer = partial(nn.LayerNorm, eps=1e-5)


def resize(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize (B, H, W, C) bicubically, as `F.interpolate` without aligned corners; unchanged for the same size.

    In exports and compiled models it is two matrix products, which serve open sizes: no other resizing has a graph for
    TensorRT and gradients for open sizes. A graph of one size has no resizing where sizes agree.
    """
    if all(_known_equal(old, new) for old, new in zip(x.shape[1:3], size)):
        return x
    if not (torch.compiler.is_compiling() or is_exporting() or x.is_meta):  # on meta, PyTorch takes longer
        x = F.interpolate(x.permute(0, 3, 1, 2), size=size, mode="bicubic", align_corners=False)
        return x.permute(0, 2, 3, 1)
    return resized(x, size)


def _known_equal(one: int, other: int) -> bool:
    """Whether sizes are equal; False if a size is open, without fixing it."""
    return bool(one == other) if torch.jit.is_tracing() else statically_known_true(one == other)


class Embedding(nn.Module):
    """Patches of one or several sizes around each position, and a linear layer: (B, C, H, W) to (B, H/p, W/p, D).

    The linear layer takes the patches of all sizes, one after another, each in the order (channel, row, column).

    Source: arXiv 2108.04384, multi-scale patch embedding.
    """

    def __init__(self, in_chans: int, dim: int, stride: int, kernels: Sequence[int], **factory):
        """Args:
        stride: The distance of positions, p.
        kernels: Sides of the patches, multiples of p; larger patches overlap, and zeros surround the map.
        """
        super().__init__()
        self.stride = stride
        self.kernels = tuple(kernels)
        self.proj = nn.Linear(in_chans * sum(kernel**2 for kernel in kernels), dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = tuple((side + self.stride - 1) // self.stride for side in x.shape[2:])
        x = resize(x.permute(0, 2, 3, 1), tuple(side * self.stride for side in size)).permute(0, 3, 1, 2)
        if is_bare(self.proj) and not torch.jit.is_tracing():  # the older ONNX exporter takes no computed kernel
            padding = (max(self.kernels) - self.stride) // 2
            return F.conv2d(x, self.kernel(), self.proj.bias, self.stride, padding).permute(0, 2, 3, 1)
        patches = [F.unfold(x, k, padding=(k - self.stride) // 2, stride=self.stride) for k in self.kernels]
        return self.proj(torch.cat(patches, 1).transpose(1, 2)).unflatten(1, size)

    def kernel(self) -> torch.Tensor:
        """The weight of the convolution that equals patches and linear layer, (D, C, K, K) with the largest size K."""
        largest, end, parts = max(self.kernels), 0, []
        channels = self.proj.in_features // sum(kernel**2 for kernel in self.kernels)
        for kernel in self.kernels:
            start, end = end, end + channels * kernel**2
            part = self.proj.weight[:, start:end].unflatten(1, (channels, kernel, kernel))
            parts.append(F.pad(part, ((largest - kernel) // 2,) * 4) if kernel < largest else part)
        return sum(parts[1:], parts[0])


class DownsamplingEmbedding(Embedding):
    """`Embedding` of the map of the level before, (B, H, W, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 3, 1, 2))


class RaftMixing(nn.Module):
    """A residual MLP along one side of (B, H, W, C); it mixes the positions of a line and the r channels of a raft.

    Channel a C/r + o, with a < r, is at place a of raft o. The MLP takes the vector (a, position).

    Source: arXiv 2108.04384, section 3.1, raft-token-mixing.
    """

    def __init__(self, dim: int, side: int, rafts: int, vertical: bool, drop_path: float, **factory):
        """Args:
        side: The number of positions of a line.
        rafts: The number of channels of a raft, r.
        vertical: Whether lines are columns; else they are rows.
        """
        super().__init__()
        self.rafts = rafts
        self.vertical = vertical
        self.norm = _norm_layer(dim, **factory)
        self.fc1 = nn.Linear(rafts * side, 2 * rafts * side, **factory)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(2 * rafts * side, rafts * side, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rafts = self.norm(x).unflatten(3, (self.rafts, -1))  # B H W r o
        lines = rafts.permute(0, 2, 4, 3, 1) if self.vertical else rafts.permute(0, 1, 4, 3, 2)
        lines = self.fc2(self.act(self.fc1(lines.flatten(3)))).unflatten(3, (self.rafts, -1))  # B line o r position
        rafts = lines.permute(0, 4, 1, 3, 2) if self.vertical else lines.permute(0, 1, 4, 3, 2)
        return (x.unflatten(3, (self.rafts, -1)) + self.drop_path(rafts)).flatten(3)


class Block(nn.Module):
    """Vertical and horizontal mixing on a map of one size, then an MLP over the channels: (B, H, W, C)."""

    def __init__(self, dim: int, grid: tuple[int, int], rafts: int, drop_path: float, **factory):
        """Args:
        grid: The size of the map on which tokens are mixed.
        """
        super().__init__()
        self.grid = grid
        self.mix_h = RaftMixing(dim, grid[0], rafts, True, drop_path, **factory)
        self.mix_w = RaftMixing(dim, grid[1], rafts, False, drop_path, **factory)
        self.norm = _norm_layer(dim, **factory)
        self.mlp = Mlp(dim, 4 * dim, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        x = self.mixed(x)
        return x + self.drop_path(self.mlp(self.norm(x)))

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        """Both mixings on the map of one size, resized back."""
        return resize(self.mix_w(self.mix_h(resize(x, self.grid))), tuple(x.shape[1:3]))


class First(Beside):
    """The state beside a map, for detectors of the authors: what the first level gives as its feature map."""

    feature: torch.Tensor | None = None


class RaftMLP(Pyramid):
    """RaftMLP: levels of patch embedding, raft-token-mixing and MLPs.

    Source: arXiv 2108.04384; details from the authors' libs/models.py and libs/modules.py.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        patch_sizes: Sequence[int] = (4, 2, 2, 2),
        kernels: Sequence[Sequence[int]] | None = None,
        rafts: int = 2,
        img_size: int | tuple[int, int] = 224,
        stride4: str = "level",
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ):
        """Args:
        depths, dims, patch_sizes: Blocks, channels and patch size of each level. Levels after the first halve the map.
        kernels: Sides of each level's patches; None for the paper's: its patch size and, but for the last level, twice
            that. Levels with one kernel equal the ablation without the multi-scale embedding.
        rafts: Channels of a raft, r; all of `dims` are multiples of it.
        img_size: The side of the images (or height and width) for which the MLPs are made: the number of parameters
            depends on it. Maps of other images are resized in each block.
        stride4: What the first feature map is: "level" for the first level's output, "embed" for its embedding before
            its blocks, as in the authors' detectors and segmentors.
        drop_path_rate: The rate of every branch of every block, not a schedule, as the authors'.
        **kwargs: num_classes, global_pool, drop_rate, norm_outputs: see `Backbone`.

        Raises:
            InputError: Arguments do not fit each other, or `stride4` is unknown.
        """
        depths, dims, patch_sizes = wholes("depths", depths), wholes("dims", dims), wholes("patch_sizes", patch_sizes)
        rafts = whole("rafts", rafts)
        if kernels is None:
            kernels = [(p, 2 * p) for p in patch_sizes[:-1]] + [patch_sizes[-1:]]
        _check(depths, dims, patch_sizes, kernels, rafts, stride4)
        factory = dict(device=device, dtype=dtype)
        grid = sides("img_size", img_size)
        stem, stages = None, []
        for i, (depth, dim, p) in enumerate(zip(depths, dims, patch_sizes)):
            grid = tuple(-(-side // p) for side in grid)
            kind = DownsamplingEmbedding if i > 0 else Embedding
            embedding = kind(dims[i - 1] if i > 0 else in_chans, dim, p, kernels[i], **factory)
            stem = stem or embedding
            blocks = [Block(dim, grid, rafts, drop_path_rate, **factory) for _ in range(depth)]
            stages.append(Stage(blocks, embedding if i > 0 else None))
        super().__init__(
            stem,
            stages,
            dims,
            stem_stride=patch_sizes[0],
            norm_layer=_norm_layer,
            in_chans=in_chans,
            **factory,
            **kwargs,
        )
        self.stride4 = stride4

    def begin(self, x: torch.Tensor) -> tuple[torch.Tensor, First | None]:
        return self.stem(x), First() if self.stride4 == "embed" else None

    def run_unit(self, unit: nn.Module, x: torch.Tensor, state: First | None) -> torch.Tensor:
        if state is not None:
            state.feature = x if unit is self.stages[0] else None
        return unit(x)

    def to_map(self, x: torch.Tensor, state: First | None) -> torch.Tensor:
        return x if state is None or state.feature is None else state.feature

    def to_features(self, x: torch.Tensor, state: First | None) -> torch.Tensor:
        return self.norm(x)


def _check(
    depths: Sequence[int],
    dims: Sequence[int],
    patch_sizes: Sequence[int],
    kernels: Sequence[Sequence[int]],
    rafts: int,
    stride4: str,
) -> None:
    if stride4 not in ("level", "embed"):
        raise InputError(f"stride4 must be 'level' or 'embed', got {stride4!r}")
    given = dict(depths=depths, dims=dims, patch_sizes=patch_sizes, kernels=kernels)
    if len({len(value) for value in given.values()}) > 1:
        counts = ", ".join(f"{len(value)} {name}" for name, value in given.items())
        raise InputError(f"each level needs a depth, channels, a patch size and kernels, got {counts}")
    if any(p != 2 for p in patch_sizes[1:]):
        raise InputError(f"patch sizes after the first must be 2, got {tuple(patch_sizes)}")
    if rafts < 1 or any(dim % rafts for dim in dims):
        raise InputError(f"dims must be multiples of rafts, which is at least 1, got {tuple(dims)} and {rafts}")
    for p, kernel in zip(patch_sizes, kernels):
        if not kernel or any(side < p or (side - p) % 2 for side in kernel):
            raise InputError(f"kernels must be at least the patch size {p}, by an even number, got {tuple(kernel)}")


# From the authors' names to ours.
OFFICIAL_NAMES = [
    (r"^levels\.0\.fn\.(?:0\.fc|1)\.(?=weight|bias)", "stem.proj."),
    (r"^levels\.(\d+)\.fn\.(?:0\.fc|1)\.(?=weight|bias)", r"stages.\1.downsample.proj."),
    (r"^levels\.(\d+)\.fn\.(\d+)\.", lambda found: f"stages.{found[1]}.blocks.{int(found[2]) - 2}."),
    (r"^(stages\.\d+\.blocks\.\d+)\.1\.", r"\1.mix_h."),
    (r"^(stages\.\d+\.blocks\.\d+)\.3\.", r"\1.mix_w."),
    (r"^(stages\.\d+\.blocks\.\d+)\.5\.norm\.", r"\1.norm."),
    (r"^(stages\.\d+\.blocks\.\d+)\.5\.", r"\1.mlp."),
    (r"^(stages\..+)\.norm\.1\.", r"\1.norm."),
    (r"^(stages\..+)\.fn\.0\.", r"\1.fc1."),
    (r"^(stages\..+)\.fn\.3\.", r"\1.fc2."),
    (r"^heads\.0\.1\.", "norm."),
    (r"^classifier\.", "head.fc."),
]


@any_prefix
def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn an official checkpoint, of a classifier or a detector's backbone, into a state dict of `model`.

    Weights of norms before raft-token-mixing get the order of the map's channels, and patches of the embedding without
    several scales get the order (channel, row, column).
    """
    rafts = model.stages[0].blocks[0].mix_h.rafts
    values = {}
    for name, value in state_dict.items():
        if re.search(r"^levels\.\d+\.fn\.\d+\.[13]\.norm\.1\.", name):
            value = value.unflatten(0, (-1, rafts)).t().flatten()  # official: index o r + a
        elif found := re.search(r"^levels\.(\d+)\.fn\.1\.weight$", name):
            embedding = model.stages[int(found[1])].downsample if found[1] != "0" else model.stem
            side = embedding.stride
            value = value.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2).flatten(1)
        values[name] = value
    return rename(values, OFFICIAL_NAMES)


def _cfg(top1: float) -> dict[str, Any]:
    return imagenet_cfg(
        top1,
        first_conv="stem.proj",
        origin_url="https://github.com/okojoalg/raft-mlp",
        paper_name="RaftMLP: How Much Can Be Done Without Attention and with Less Spatial Locality?",
        paper_ids="arXiv:2108.04384",
        description="the authors publish no weights; checkpoints of their code load",
    )


default_cfgs = generate_default_cfgs(
    {
        "raftmlp_s": _cfg(76.1),
        "raftmlp_m": _cfg(78.8),
        "raftmlp_l": _cfg(79.4),
    }
)


register_variants(
    __name__,
    RaftMLP,
    {
        "raftmlp_s": dict(dims=(64, 128, 256, 512)),
        "raftmlp_m": dict(dims=(96, 192, 384, 768)),
        "raftmlp_l": dict(dims=(128, 192, 512, 1024)),
    },
)
