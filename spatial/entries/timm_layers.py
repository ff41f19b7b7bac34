"""timm's layers."""

import torch
from torch import nn

from terrazzo.errors import InputError
from terrazzo.spatial._attention import attention
from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._norms import group_norm
from terrazzo.spatial._operators import convolve, greatest
from terrazzo.spatial._part import Part
from terrazzo.spatial._tokens import begin, counted, counts

_OWN = (
    "DropPath Mlp GluMlp SwiGLU LayerScale LayerScale2d LayerNorm LayerNorm2d LayerNormFp32 LayerNorm2dFp32 RmsNorm "
    "RmsNorm2d GELU GELUTanh Swish Mish Sigmoid Tanh HardSwish HardSigmoid HardMish PReLU QuickGELU Format "
    "SelectAdaptivePool2d ClassifierHead NormMlpClassifierHead"
)


def _moved(x: torch.Tensor, fmt: str) -> torch.Tensor:
    return x.movedim(-1, 1) if str(getattr(fmt, "value", fmt)) == "NHWC" else x


def _format(pool: nn.Module) -> str:
    """The layout of a pool's input: it reduces dimensions 1 and 2, or 2 and 3."""
    return "NHWC" if tuple(pool.dim) == (1, 2) else "NCHW"


def _average(part: Part, pool: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return part.mean(x, pool.dim[0], keepdim=not pool.flatten)


def _max(part: Part, pool: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = greatest(part, _moved(x, _format(pool)))
    if pool.flatten:
        return y.flatten(1)
    return y.movedim(1, -1) if _format(pool) == "NHWC" else y


def _group_norm(part: Part, norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    return group_norm(part, x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def _squeeze_excite(part: Part, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    found = part.mean(x)
    if module.add_maxpool:
        found = 0.5 * found + 0.5 * greatest(part, x)
    return x * module.gate(module.fc2(module.act(module.bn(module.fc1(found)))))


def _effective_squeeze_excite(part: Part, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    found = part.mean(x)
    if module.add_maxpool:
        found = 0.5 * found + 0.5 * greatest(part, x)
    return x * module.gate(module.fc(found))


def _response_norm(part: Part, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """ConvNeXt V2's norm by the energy of a channel in the whole map."""
    level = part.level(x, module.spatial_dim[0])
    squares = x.square().sum(module.spatial_dim, keepdim=True)
    energy = (squares if level.whole else part.total(squares)).sqrt()
    energy = energy / (energy.mean(module.channel_dim, keepdim=True) + module.eps)
    return x + torch.addcmul(module.bias.view(module.wb_shape), module.weight.view(module.wb_shape), x * energy)


def _patches(part: Part, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Patches of an image, as tokens or as a map."""
    excess = tuple(side - 1 for side in module.patch_size) if module.dynamic_img_pad else (0, 0)
    x = convolve(part, module.proj, x, excess)
    begin(part, x)
    if module.flatten:
        x = x.flatten(2).transpose(1, 2)
    elif str(getattr(module.output_fmt, "value", module.output_fmt)) == "NHWC":
        x = x.permute(0, 2, 3, 1)
    return module.norm(x)


def _check_patches(module: nn.Module) -> str | None:
    fmt = str(getattr(module.output_fmt, "value", module.output_fmt))
    return None if module.flatten or fmt in ("NCHW", "NHWC") else f"its output has the layout {fmt}"


def attend_to_all(
    part: Part, module: nn.Module, x: torch.Tensor, attn_mask: object = None, is_causal: bool = False
) -> torch.Tensor:
    """Attention of own tokens to the tokens of all ranks."""
    if attn_mask is not None or is_causal or (module.training and module.attn_drop.p > 0):
        raise InputError(f"{part.at} has a mask or dropout of weights, which is not done across ranks")
    qkv = module.qkv(x).unflatten(2, (3, module.num_heads, module.head_dim))  # B N 3 heads D
    query = module.q_norm(qkv[:, :, 0].transpose(1, 2))
    own = counted(part, qkv)
    key, value = module.k_norm(own[:, :, 1].transpose(1, 2)), own[:, :, 2].transpose(1, 2)
    out = attention(part, query, key, value, counts(part), module.scale)
    out = module.norm(out.transpose(1, 2).flatten(2))
    if module.gate is not None:
        out = out * module.gate(x).sigmoid()
    return module.proj_drop(module.proj(out))


ENTRIES = {
    **dict.fromkeys(_OWN.split(), OWN),
    "PatchEmbed": Entry(_patches, check=_check_patches),
    "Attention": Entry(attend_to_all),
    "FastAdaptiveAvgPool": Entry(_average),
    "FastAdaptiveMaxPool": Entry(_max),
    "GroupNorm": Entry(_group_norm),
    "GroupNorm1": Entry(_group_norm),
    "SqueezeExcite": Entry(_squeeze_excite),
    "SEModule": Entry(_squeeze_excite),
    "EffectiveSEModule": Entry(_effective_squeeze_excite),
    "GlobalResponseNorm": Entry(_response_norm),
    "GlobalResponseNormMlp": OWN,
}
