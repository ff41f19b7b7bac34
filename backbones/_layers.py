"""Layers and functions on maps of any size that several families share."""

import math

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_ as draw_truncated
from torch import nn

from terrazzo.backbones._bare import on_few_positions
from terrazzo.kernels.dispatch.dtypes import without_autocast


def on_maps(x: torch.Tensor, *layers: nn.Module) -> torch.Tensor:
    """Apply layers of (B, C, H, W) to (B, H, W, C), a channels_last view of it: nothing is copied."""
    x = x.permute(0, 3, 1, 2)
    for layer in layers:
        x = layer(x)
    return x.permute(0, 2, 3, 1)


def patch_conv(in_channels: int, out_channels: int, side: int, **kwargs) -> nn.Conv2d:
    """A convolution whose stride is its kernel size, for the output of `whole_patches`."""
    return nn.Conv2d(in_channels, out_channels, side, stride=side, **kwargs)


def whole_patches(x: torch.Tensor, side: int, dilation: int = 1) -> torch.Tensor:
    """Pad (B, C, H, W) with zeros at the right and bottom, so that no patch that begins in the map is lost.

    The padding is always side - 1, times the dilation of the patches, and the convolution drops the excess. This equals
    padding to a multiple of the stride, as timm's patch embedding does, but without a branch on the size. So compiling
    for symbolic sizes is several times faster.
    """
    excess = (side - 1) * dilation
    return F.pad(x, (0, excess, 0, excess)) if side > 1 else x


def cells(count: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """(count, size) weights; their product with a side of length `size` is its adaptive average pooling."""
    cell = torch.arange(count, device=like.device)[:, None]
    place = torch.arange(size, device=like.device)[None]
    # floor(cell * size / count) <= place < ceil((cell + 1) * size / count), without a division.
    inside = ((place + 1) * count > cell * size).to(like.dtype) * (place * count < (cell + 1) * size).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


def bicubic(old: int, new: int, like: torch.Tensor, antialias: bool = False) -> torch.Tensor:
    """(new, old) weights; their product with a side is its bicubic resizing, as by `F.interpolate`.

    For a side that keeps its length the weights are exactly 0 and 1.
    """
    index = torch.arange(new, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))[:, None]
    known = torch.arange(old, device=like.device)
    count = index.amax(0, keepdim=True) + 1  # `new`, as a tensor; a slice would not do for every open size
    if antialias:
        weight = _cubic(((index + 0.5) * old / count - (known + 0.5)) / (old / count).clamp(min=1), -0.5)
        return (weight / weight.sum(1, keepdim=True)).to(like.dtype)
    place = ((index + 0.5) * (old / count) - 0.5)[:, None]
    at = place.floor() + torch.arange(-1, 3, device=like.device)[:, None]  # the four neighbours
    weight = _cubic(place - at, -0.75) * (at.clamp(0, old - 1) == known)  # edges are repeated
    return weight.sum(1).to(like.dtype)


def resized(x: torch.Tensor, size: tuple[int, int], antialias: bool = False) -> torch.Tensor:
    """Resize maps (B, H, W, C) bicubically, as `F.interpolate`, by matrix products.

    TensorRT resizes linearly only, and torch 2.15 fails to differentiate resizing to open sizes. A graph has no branch
    on the size, so that it serves all sizes; a side that keeps its length is unchanged.
    """
    rows, columns = (bicubic(old, new, x, antialias) for old, new in zip(x.shape[1:3], size))
    with without_autocast(x):
        return (rows @ (columns @ x).flatten(2)).unflatten(2, (size[1], -1))


def _cubic(distance: torch.Tensor, a: float) -> torch.Tensor:
    """Keys' cubic convolution kernel; PyTorch has `a` = -0.5 with antialiasing and -0.75 without."""
    x = distance.abs()
    inner, outer = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0))


def learned_number(value: float, requires_grad: bool = True, **factory) -> nn.Parameter:
    """A parameter of shape (1,), because PyTorch cannot shard 0-d parameters. See `take_scalars`."""
    return nn.Parameter(torch.full((1,), float(value), **factory), requires_grad)


def take_scalars(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *args) -> None:
    """A load hook: give a module's learned numbers their shape; in older and others' checkpoints they are 0-d."""
    for name, parameter in module.named_parameters(prefix[:-1], recurse=False):
        if name in state:
            state[name] = _dimensioned(state[name], parameter)


def dimensioned(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict of `model` with learned numbers in the model's shape."""
    own = model.state_dict()
    return {name: _dimensioned(value, own[name]) if name in own else value for name, value in state.items()}


def _dimensioned(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return value.reshape(1) if value.dim() == 0 and like.shape == (1,) else value


class WideLayerNorm(nn.LayerNorm):
    """A layer norm that computes in the dtype of its input, for inputs wider than its weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def window_counts(size: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """The number of windows in a column and in a row; no window is padding alone."""
    # No remainders, here and in padding: exporters can solve sums of products for open sizes.
    rows, columns = ((extent + side - 1) // side for extent, side in zip(size, window))
    return rows, columns


def split_windows(x: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """Split (B, H, W, C) into windows of one size, (B, rows, columns, h, w, C), with zeros below and on the right."""
    size = tuple(x.shape[1:3])
    rows, columns = window_counts(size, window)
    x = F.pad(x, (0, 0, 0, columns * window[1] - size[1], 0, rows * window[0] - size[0]))
    return x.unflatten(2, (columns, window[1])).unflatten(1, (rows, window[0])).transpose(2, 3)


def join_windows(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The inverse of `split_windows`, to (B, H, W, C) with (H, W) = `size`."""
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, : size[0], : size[1]]


def pixels_of_patches(x: torch.Tensor, step: int | None = None) -> torch.Tensor:
    """Concatenate the four pixels of each 2x2 patch: (B, H, W, C) to (B, ceil(H/2), ceil(W/2), 4 C).

    Pixels are in Swin's order: upper left, lower left, upper right, lower right. Odd sides are zero-padded by one.

    Args:
        step: If given, each position has a patch, whose pixels are `step` positions apart: (B, H, W, 4 C).
    """
    if step is not None:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, step, 0, step))
        rows = x[:, :height], x[:, step : height + step]
        return torch.cat([row[:, :, w : width + w] for w in (0, step) for row in rows], -1)
    x = F.pad(x, (0, 0, 0, 1, 0, 1))  # for an even side the added row is not read
    even, odd = x[:, :-1:2], x[:, 1::2]
    return torch.cat([part for w in (slice(0, -1, 2), slice(1, None, 2)) for part in (even[:, :, w], odd[:, :, w])], -1)


class PatchEmbed(nn.Module):
    """Patches of any image, then a norm: (B, C, H, W) to (B, ceil(H/p), ceil(W/p), D)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, **factory):
        super().__init__()
        self.patch_size = patch_size
        self.proj = patch_conv(in_chans, dim, patch_size, **factory)
        self.norm = nn.LayerNorm(dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(whole_patches(x, self.patch_size)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Swin's downsampler: the four pixels of a 2x2 patch as channels, norm, linear; odd sides zero-padded by one.

    Attributes:
        step: see `pixels_of_patches`.
    """

    def __init__(self, dim: int, **factory):
        super().__init__()
        self.step: int | None = None
        self.norm = nn.LayerNorm(4 * dim, **factory)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reduction(self.norm(pixels_of_patches(x, self.step)))

    def dilate(self, before: int, after: int) -> None:
        self.step = before


class ConvDownsampler(nn.Module):
    """A 3x3 convolution of stride 2 that doubles the channels, then a norm, on (B, H, W, C)."""

    def __init__(self, dim: int, bias: bool = False, **factory):
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=bias, **factory)
        self.norm = nn.LayerNorm(2 * dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(on_few_positions(self.reduction, x))


def trunc_normal_(tensor: torch.Tensor, std: float) -> None:
    """Draw from a truncated normal distribution. A tensor on the meta device has no numbers, and takes no time."""
    if not tensor.is_meta:
        draw_truncated(tensor, std=std)


def init_linear(module: nn.Module) -> None:
    """The usual initialisation of ViTs, for `Module.apply`: linear layers of standard deviation 0.02, zero biases."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def initial_step_bias(*shape: int, **factory) -> torch.Tensor:
    """Biases that a softplus turns into step sizes spread evenly, on a log scale, from 1e-3 to 1e-1.

    Source: Mamba, arXiv 2312.00752, section 3.6.
    """
    steps = torch.exp(torch.empty(shape, **factory).uniform_(math.log(1e-3), math.log(1e-1))).clamp(min=1e-4)
    return steps + torch.log(-torch.expm1(-steps))
