"""timm's layers."""

import torch
from torch import nn

from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._norms import group_norm
from terrazzo.spatial._operators import greatest
from terrazzo.spatial._part import Part

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


ENTRIES = {
    **dict.fromkeys(_OWN.split(), OWN),
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
