"""MambaVision: residual convolutions, then windows of Mamba mixers, then windows of attention.

Paper: MambaVision: A Hybrid Mamba-Transformer Vision Backbone, CVPR 2025, arXiv 2407.08083.
Official code: github.com/NVlabs/MambaVision, NVIDIA Source Code License-NC; nothing here is taken from it. Weights by
the authors, CC-BY-NC-SA-4.0, not for commercial use; loading them logs this notice.

Where paper and code disagree, this follows the code: the mixer's convolutions have no bias, its bias of dt enters
twice, all linear layers begin with a standard deviation of 0.02 (dt_proj, too), and the last floor(n / 2) of n blocks
attend.

A map is padded with zeros to a multiple of the window before a stage's first norm; scans and attention treat the
padding like any position. Released detectors and segmentors have windows larger than most maps, so most of their
computation is padding. The last block of a stage skips the padding, because nothing reads it. No other block can skip
it exactly: k steps after the map the state of a scan still holds a^k of the map, with a learned 0 < a < 1. So padded
positions differ from each other in general, and attention reads all of them. `fit_windows` leaves out the padding of
windows that are larger than the map, and changes outputs.

Deviations without effect on outputs: a downsampler opens its stage instead of closing the stage before, and A_log and D
have no weight decay (the authors mark them, too, but with an attribute that timm does not read).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, Mlp, calculate_drop_path_rates
from timm.models import generate_default_cfgs
from torch import nn

from terrazzo.backbones._bare import on_few_positions, on_sequences, step_sizes
from terrazzo.backbones._dilation import dilate
from terrazzo.backbones._layers import init_linear, join_windows, split_windows
from terrazzo.backbones._pyramid import Pyramid, Stage
from terrazzo.backbones._registration import imagenet_cfg, register_variants
from terrazzo.backbones._states import Beside
from terrazzo.backbones._weights import LAST_PROJECTION, any_prefix, rename, take_old_names
from terrazzo.errors import InputError
from terrazzo.kernels import selective_scan

__all__ = ["MambaVision"]


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, GELU between them, added to their input: (B, C, H, W)."""

    def __init__(self, dim: int, drop_path: float, **factory):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, **factory)
        self.norm1 = nn.BatchNorm2d(dim, **factory)
        self.act = nn.GELU(approximate="tanh")
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, **factory)
        self.norm2 = nn.BatchNorm2d(dim, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        return x + self.drop_path(self.update(x))

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """What the block adds to its input."""
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))


class Kept(Beside):
    """The state of a stage's blocks: the number of first rows and columns of a window that the output keeps.

    They are the height and width of the map.
    """

    height: int = 0
    width: int = 0


class MambaVisionMixer(nn.Module):
    """One scan by rows over half of the channels of windows (B, h, w, C); the other half bypasses it. No gate.

    Source: arXiv 2407.08083, section 3.2 (equation 5), with 8 states and C / 16 channels of dt.
    """

    states = 8

    def __init__(self, dim: int, **factory):
        super().__init__()
        half, self.rank = dim // 2, -(-dim // 16)
        self.A_log = nn.Parameter(torch.arange(1.0, self.states + 1, **factory).log().repeat(half, 1))
        self.D = nn.Parameter(torch.ones(half, **factory))
        self.in_proj = nn.Linear(dim, dim, bias=False, **factory)
        self.x_proj = nn.Linear(half, self.rank + 2 * self.states, bias=False, **factory)
        self.dt_proj = nn.Linear(self.rank, half, **factory)
        self.proj_out = nn.Linear(dim, dim, bias=False, **factory)
        self.conv1d_x = nn.Conv1d(half, half, 3, padding=1, groups=half, bias=False, **factory)
        self.conv1d_z = nn.Conv1d(half, half, 3, padding=1, groups=half, bias=False, **factory)
        self.register_load_state_dict_pre_hook(take_old_names)

    def forward(self, x: torch.Tensor, kept: Kept) -> torch.Tensor:
        """The output at the kept positions of a window; it depends on all positions."""
        sides = x.shape[1:3]
        x = self.in_proj(x.flatten(1, 2))  # B L C
        x, z = F.silu(on_sequences(x, self.conv1d_x, self.conv1d_z)).chunk(2, -1)
        dt, B, C = self.x_proj(x).split([self.rank, self.states, self.states], -1)
        delta, bias = step_sizes(self.dt_proj, dt, times=2)
        y = selective_scan(
            x.transpose(1, 2),
            delta.transpose(1, 2),
            -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D,
            delta_bias=bias,
            delta_softplus=True,
        )
        return self.proj_out(torch.cat([y.transpose(1, 2), z], -1).unflatten(1, sides)[:, : kept.height, : kept.width])


class Attention(nn.Module):
    """Multi-head attention within windows (B, h, w, C), without position embeddings."""

    def __init__(self, dim: int, num_heads: int, **factory):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **factory)
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(self, x: torch.Tensor, kept: Kept) -> torch.Tensor:
        """The output at the kept positions of a window, as in `MambaVisionMixer`."""
        query, key, value = self.qkv(x).chunk(3, -1)
        query = query[:, : kept.height, : kept.width]
        heads = (y.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (query, key, value))
        out = F.scaled_dot_product_attention(*heads)
        return self.proj(out.transpose(1, 2).flatten(2).unflatten(1, query.shape[1:3]))


class WindowBlock(nn.Module):
    """Pre-norm mixer and MLP, each with an optional per-channel layer scale."""

    def __init__(self, dim: int, mixer: nn.Module, last: bool, layer_scale: float | None, drop_path: float, **factory):
        """Args:
        last: Whether this is the last block of its stage, which skips the padding.
        """
        super().__init__()
        self.last = last
        self.gamma_1, self.gamma_2 = (
            None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale, **factory)) for _ in range(2)
        )
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.mlp = Mlp(dim, 4 * dim, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, kept: Any = None) -> torch.Tensor:
        """Run the block on windows (B, h, w, C). Only the last block of a stage uses `kept` (`Kept`; None for all)."""
        here = kept if kept is not None and self.last else Kept(height=x.shape[1], width=x.shape[2])
        update = self.mixer(self.norm1(x), here)
        x = x[:, : here.height, : here.width] + self.drop_path(
            update if self.gamma_1 is None else self.gamma_1 * update
        )
        update = self.mlp(self.norm2(x))
        return x + self.drop_path(update if self.gamma_2 is None else self.gamma_2 * update)


class WindowStage(Stage):
    """A stage whose blocks run on separate windows; maps are (B, C, H, W).

    Attributes:
        window_size: Side of the windows.
        fit_windows: Whether windows shrink to a map with a smaller side.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module, window_size: int, fit_windows: bool):
        super().__init__(blocks, downsample)
        self.window_size = window_size
        self.fit_windows = fit_windows

    def dilate(self, before: int, after: int) -> None:
        """Windows keep their part of the image; convolutions and scans along a window stay as they are."""
        self.window_size *= after
        dilate(self.downsample, before, after)

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        x = on_few_positions(self.downsample, x.permute(0, 2, 3, 1))
        return self.on_windows(x, tuple(x.shape[1:3])).permute(0, 3, 1, 2)

    def on_windows(self, x: torch.Tensor, whole: tuple[int, int]) -> torch.Tensor:
        """Run the blocks on the windows of (B, H, W, C).

        Args:
            whole: Height and width of the map; `x` may be some of its rows of windows.
        """
        size = tuple(x.shape[1:3])
        sides = [min(self.window_size, side) if self.fit_windows else self.window_size for side in whole]
        x = split_windows(x, sides)
        counts = x.shape[1:3]
        x = self.run(x.flatten(0, 2), Kept(height=size[0], width=size[1]))  # all windows of an image together
        return join_windows(x.unflatten(0, (-1, *counts)), size)


def _downsampler(dim: int, **factory) -> nn.Conv2d:
    return nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False, **factory)


class MambaVision(Pyramid):
    """Two stages of convolutions, then two stages of windows, with Mamba mixers first and attention last.

    Source: arXiv 2407.08083, section 3 and figure 2.
    """

    map_fmt = "NCHW"
    dilates = True
    no_decay = ("A_log", "D")

    def __init__(
        self,
        depths: Sequence[int] = (1, 3, 8, 4),
        dim: int = 80,
        stem_dim: int = 32,
        num_heads: Sequence[int] = (8, 16),
        window_size: Sequence[int] = (14, 7),
        fit_windows: bool = False,
        layer_scale: float | None = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        norm_outputs: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ):
        """Args:
        depths: Blocks per stage.
        dim: Channels of the first stage; each later stage has twice as many as the stage before.
        num_heads, window_size: For the third and the fourth stage. No weight depends on the windows, but outputs do:
            released detectors have (112, 56), segmentors (64, 32) and the small segmentor (160, 56).
        fit_windows: Shrink a window that is larger than the map to the map, instead of padding the map.
            Cheap, but not what released detectors and segmentors compute.
        layer_scale: Initial value of the per-channel scales; None for no scales.
        **kwargs: num_classes, global_pool, drop_rate: see `Backbone`.

        Raises:
            InputError: `window_size` or `num_heads` is not a pair of positive numbers.
        """
        for name, pair in (("window_size", window_size), ("num_heads", num_heads)):
            if len(pair) != 2 or min(pair) < 1:
                raise InputError(f"{name} must be two positive numbers, for the third and the fourth stage, got {pair}")
        factory = dict(device=device, dtype=dtype)
        channels = [dim * 2**i for i in range(len(depths))]
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages: list[Stage] = []
        for i, (depth, width) in enumerate(zip(depths, channels)):
            downsample = _downsampler(width // 2, **factory) if i > 0 else None
            if i < 2:
                stages.append(Stage([ConvBlock(width, rate, **factory) for rate in rates[i]], downsample))
                continue
            blocks = []
            for j, rate in enumerate(rates[i]):
                attends, last = j >= depth - depth // 2, j == depth - 1
                mixer = Attention(width, num_heads[i - 2], **factory) if attends else MambaVisionMixer(width, **factory)
                blocks.append(WindowBlock(width, mixer, last, layer_scale, rate, **factory))
            stages.append(WindowStage(blocks, downsample, window_size[i - 2], fit_windows))
        stem = nn.Sequential(
            nn.Conv2d(in_chans, stem_dim, 3, stride=2, padding=1, bias=False, **factory),
            nn.BatchNorm2d(stem_dim, eps=1e-4, **factory),
            nn.ReLU(),
            nn.Conv2d(stem_dim, dim, 3, stride=2, padding=1, bias=False, **factory),
            nn.BatchNorm2d(dim, eps=1e-4, **factory),
            nn.ReLU(),
        )
        super().__init__(
            stem,
            stages,
            channels,
            norm_layer=partial(LayerNorm2d, eps=1e-5) if norm_outputs else nn.BatchNorm2d,
            in_chans=in_chans,
            norm_outputs=norm_outputs,
            **factory,
            **kwargs,
        )
        self.apply(init_linear)


# From the authors' names to ours.
OFFICIAL_NAMES = [
    (r"^patch_embed\.conv_down\.", "stem."),
    (r"^levels\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    *((rf"^levels\.{i}\.downsample\.reduction\.0\.", f"stages.{i + 1}.downsample.") for i in range(3)),
    LAST_PROJECTION,
    (r"^outnorm(?=\d)", "norm"),
    (r"^head\.(?=weight|bias)", "head.fc."),
]


@any_prefix
def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn an official checkpoint into a state dict of `model`, and log its licence.

    It takes the authors' classifiers, also inside a larger network (`model.` or `encoder.`), and the backbones of their
    detectors and segmentors (`backbone.`, with `outnorm0`..`outnorm3`: build the model with `norm_outputs=True`).
    """
    return rename(state_dict, OFFICIAL_NAMES)


def _cfg(hub: str, file: str, top1: float, **kwargs) -> dict[str, Any]:
    return imagenet_cfg(
        top1,
        hf_hub_id=f"nvidia/MambaVision-{hub}",
        hf_hub_filename=f"mambavision_{file}.pth.tar",
        first_conv="stem.0",
        license="cc-by-nc-sa-4.0",
        origin_url="https://github.com/NVlabs/MambaVision",
        paper_name="MambaVision: A Hybrid Mamba-Transformer Vision Backbone",
        paper_ids="arXiv:2407.08083",
        **{"crop_pct": 1.0, **kwargs},
    )


_512 = dict(input_size=(3, 512, 512), pool_size=(16, 16), crop_pct=0.93, crop_mode="squash")

default_cfgs = generate_default_cfgs(
    {
        "mambavision_t.in1k": _cfg("T-1K", "tiny_1k", 82.3),
        "mambavision_t2.in1k": _cfg("T2-1K", "tiny2_1k", 82.7, crop_pct=0.98),
        "mambavision_s.in1k": _cfg("S-1K", "small_1k", 83.3, crop_pct=0.93),
        "mambavision_b.in1k": _cfg("B-1K", "base_1k", 84.2),
        "mambavision_b.in21k_ft_in1k": _cfg("B-21K", "base_21k", 84.9),
        "mambavision_l.in1k": _cfg("L-1K", "large_1k", 85.0),
        "mambavision_l.in21k_ft_in1k": _cfg("L-21K", "large_21k", 86.1),
        "mambavision_l2.in1k": _cfg("L2-1K", "large2_1k", 85.3),
        "mambavision_l2_512.in21k_ft_in1k": _cfg("L2-512-21K", "L2_21k_240m_512", 87.3, **_512),
    }
)

_LARGE = dict(dim=196, stem_dim=64, num_heads=(16, 32), layer_scale=1e-5)

register_variants(
    __name__,
    MambaVision,
    {
        "mambavision_t": dict(depths=(1, 3, 8, 4), dim=80, stem_dim=32),
        "mambavision_t2": dict(depths=(1, 3, 11, 4), dim=80, stem_dim=32),
        "mambavision_s": dict(depths=(3, 3, 7, 5), dim=96, stem_dim=64),
        "mambavision_b": dict(depths=(3, 3, 10, 5), dim=128, stem_dim=64, layer_scale=1e-5),
        "mambavision_l": dict(depths=(3, 3, 10, 5), **_LARGE),
        "mambavision_l2": dict(depths=(3, 3, 12, 5), **_LARGE),
        "mambavision_l2_512": dict(depths=(3, 3, 12, 5), window_size=(32, 16), **_LARGE),
    },
)
