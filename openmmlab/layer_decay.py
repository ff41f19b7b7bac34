"""Layer-wise learning rates: early layers of a pretrained backbone learn more slowly than late layers and the head."""

import fnmatch
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from timm.models._manipulate import group_parameters
from torch import nn

from terrazzo.errors import InputError


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Scales the learning rate of a layer by `layer_decay` to the power of its distance from the head.

    The layers come from the backbone's `group_matcher`, so this works for every family. Necks and heads have scale 1.
    Tensors of one dimension have no weight decay, and neither have the tensors that the backbone's `no_weight_decay()`
    names.

    Args:
        optim_wrapper_cfg: mmengine's, with the key `optimizer`.
        paramwise_cfg: `layer_decay`, above 0 and at most 1 (default 0.9).

    Raises:
        InputError: if `paramwise_cfg` has other keys or a value out of range, or the model has no backbone with layers.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        options = dict(paramwise_cfg or {})
        self.layer_decay = options.pop("layer_decay", 0.9)
        if options:
            raise InputError(f"paramwise_cfg has unknown keys {sorted(options)}; it takes layer_decay and nothing else")
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"layer_decay is {self.layer_decay}; it must be above 0 and at most 1")
        # mmengine reads an empty paramwise_cfg as "no groups at all"
        super().__init__(optim_wrapper_cfg, {"layer_decay": self.layer_decay})

    def add_params(self, params: list[dict], module: nn.Module, **kwargs: Any) -> None:
        """Adds one group for each pair of scale and weight decay; each trainable parameter is in exactly one."""
        scales = self.scales(module)
        undecayed = _undecayed(module)
        groups: dict[tuple[float, float], dict] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            decay = 0.0 if parameter.ndim <= 1 or name in undecayed else (self.base_wd or 0.0)
            group = groups.setdefault(
                (scales[name], decay),
                {"params": [], "lr": self.base_lr * scales[name], "weight_decay": decay, "lr_scale": scales[name]},
            )
            group["params"].append(parameter)
        params.extend(groups[key] for key in sorted(groups))
        print_log(
            f"layer decay {self.layer_decay}: {len(params)} groups, scales {min(scales.values()):.4g} to 1",
            logger="current",
        )

    def scales(self, model: nn.Module) -> dict[str, float]:
        """Maps every parameter's name to the scale of its learning rate."""
        backbones = _backbones(model)
        if not backbones:
            raise InputError("the model has no part with a group_matcher; use TerrazzoBackbone, or a Classifier")
        scales = {name: 1.0 for name, _ in model.named_parameters()}
        for prefix, backbone in backbones.items():
            layers = group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
            # A classifier's head is its last layer; a detector's heads come one layer after the backbone.
            has_head = bool(getattr(backbone, "num_classes", 0))
            top = max(layers.values()) + (0 if has_head else 1)
            for name, layer in layers.items():
                scales[prefix + name] = self.layer_decay ** (top - layer)
        return scales


def _backbones(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost parts of a model that know their layers, by the prefix of their parameters' names."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if hasattr(module, "group_matcher") and not any(prefix.startswith(outer) for outer in found):
            found[prefix] = module
    return found


def _undecayed(model: nn.Module) -> set[str]:
    """The names of the parameters that `no_weight_decay()` of a backbone names or matches."""
    names = set()
    for prefix, backbone in _backbones(model).items():
        patterns = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
        for name, _ in backbone.named_parameters():
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                names.add(prefix + name)
    return names
