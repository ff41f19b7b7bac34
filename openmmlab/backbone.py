"""Any registered timm model as the backbone of an OpenMMLab detector or segmentor."""

import re
from collections.abc import Sequence
from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from timm.models import FeatureInfo
from timm.models._manipulate import group_parameters
from torch import Tensor, nn

from terrazzo.backbones._hosts import ADDED
from terrazzo.backbones._names import check_name, family_of
from terrazzo.checkpoints.loading import load_weights
from terrazzo.errors import InputError
from terrazzo.openmmlab._timm import create_model


@MODELS.register_module()
class TerrazzoBackbone(BaseModule):
    """Builds a timm model and returns its feature maps as a tuple of B C H W tensors.

    Attributes:
        model: the timm model, without its classifier.
        out_channels: the channels of each returned map.
        strides: the stride of each returned map.

    Args:
        name: the name of a model, as in `timm.list_models()`.
        pretrained: whether to load the weights that timm knows.
        checkpoint: a file of weights to load instead: official, or from a training with this wrapper.
        out_indices: which feature maps to return, as timm counts them. terrazzo's pyramids have maps 0 to 3 at strides
            4 to 32; timm's ResNets have a map of stride 2 before these, and so take `(1, 2, 3, 4)`.
        drop_path_rate: the largest rate of stochastic depth; None leaves it to the model.
        frozen_stages: -1 trains everything; 0 freezes the stem; i freezes the stem and the first i stages. Frozen parts
            stay in evaluation mode.
        norm_outputs: whether each returned map goes through its own LayerNorm. None means yes if the model has these
            norms (terrazzo's models have them, like the detectors of their papers); True adds them to any other model.
        with_cp: whether to save memory by recomputing activations in the backward pass.
        init_cfg: mmengine's `dict(type="Pretrained", checkpoint=FILE)`, which means `checkpoint=FILE`; anything else is
            ignored, because timm sets the weights.
        reduce: arguments of `terrazzo.reduce`, for a plain ViT that merges or drops tokens:
            `dict(method="mctf", r=0.35)`.
        convert: arguments of `terrazzo.convert_attention`, for a plain ViT with another mechanism in place of softmax
            attention: `dict(mixer="hedgehog", layers=[0, 1, 2])`; or several of these.
        **kwargs: further arguments of the model.

    Raises:
        InputError: if the model, an index, the checkpoint or an argument does not exist or does not fit.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        checkpoint: str | None = None,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        norm_outputs: bool | None = None,
        with_cp: bool = False,
        init_cfg: dict | None = None,
        reduce: dict | None = None,
        convert: dict | Sequence[dict] | None = None,
        **kwargs: Any,
    ):
        super().__init__(init_cfg)
        check_name(name)
        brings_norms = family_of(name) is not None  # terrazzo's own know `norm_outputs`
        if brings_norms:
            kwargs["norm_outputs"] = norm_outputs is not False
        if drop_path_rate is not None:
            kwargs["drop_path_rate"] = drop_path_rate
        self.name = name
        model = create_model(name, pretrained, reduce, convert, num_classes=0, **kwargs)
        if not hasattr(model, "forward_intermediates"):
            raise InputError(
                f"model '{name}' has no forward_intermediates, so it gives no feature maps; choose another"
            )
        if isinstance(init_cfg, dict) and init_cfg.get("type") == "Pretrained":
            if checkpoint is not None:
                raise InputError("checkpoint and init_cfg both name weights of the backbone; give one of them")
            checkpoint = init_cfg["checkpoint"]
        if checkpoint is not None:
            # The last norm is removed below, so a training with this wrapper does not save it.
            load_weights(model, name, checkpoint, optional=rf"^(fc_)?norm\d*\.|num_batches_tracked$|{ADDED}")
        info = model.feature_info.info if isinstance(model.feature_info, FeatureInfo) else model.feature_info
        self.out_indices = _checked_indices(name, out_indices, len(info))
        self.out_channels = [info[index]["num_chs"] for index in self.out_indices]
        self.strides = [info[index]["reduction"] for index in self.out_indices]
        self.stage_of = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
        if hasattr(model, "prune_intermediate_layers"):
            model.prune_intermediate_layers(list(self.out_indices), prune_norm=True, prune_head=True)
        self.model = model
        self.norms = nn.ModuleList(map(LayerNorm2d, self.out_channels)) if norm_outputs and not brings_norms else None
        if with_cp:
            model.set_grad_checkpointing(True)
        self.frozen_stages = frozen_stages
        self._freeze()

    def forward(self, x: Tensor, **choices: Any) -> tuple[Tensor, ...]:
        """Computes the feature maps of B 3 H W images.

        Args:
            **choices: further arguments of the model for one pass, such as the `task` of an M3ViT.
        """
        maps = self.model.forward_intermediates(
            x, indices=list(self.out_indices), norm=False, output_fmt="NCHW", intermediates_only=True, **choices
        )
        if self.norms is not None:
            maps = [norm(feature) for norm, feature in zip(self.norms, maps)]
        return tuple(maps)

    def init_weights(self) -> None:
        """Leaves the weights as timm or the checkpoint set them; mmengine would initialise them again."""
        self._is_init = True

    def train(self, mode: bool = True) -> "TerrazzoBackbone":
        """Switches between training and evaluation; frozen parts stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _freeze(self) -> None:
        """Turns off the gradients of the stem and of the first `frozen_stages` stages."""
        stages = max(stage for key, stage in self.stage_of.items() if not re.match(r"norm|head|fc", key))
        if not -1 <= self.frozen_stages <= stages:
            raise InputError(f"frozen_stages is {self.frozen_stages}; for model '{self.name}' it is -1 to {stages}")
        for key, parameter in self.model.named_parameters():
            if self.stage_of[key] <= self.frozen_stages:
                parameter.requires_grad = False

    def _frozen_modules(self) -> list[nn.Module]:
        """The modules that have parameters, all in frozen stages."""
        if self.frozen_stages < 0:
            return []
        found = []
        for prefix, module in self.model.named_modules():
            keys = [f"{prefix}.{key}" if prefix else key for key, _ in module.named_parameters()]
            if keys and all(self.stage_of[key] <= self.frozen_stages for key in keys):
                found.append(module)
        return found


def _checked_indices(name: str, out_indices: Sequence[int], count: int) -> tuple[int, ...]:
    """The indices of maps counted from the front.

    Raises:
        InputError: if there are no indices, an index is out of range, or they do not rise.
    """
    indices = tuple(index + count if index < 0 else index for index in out_indices)
    if not indices or any(not 0 <= index < count for index in indices) or list(indices) != sorted(set(indices)):
        raise InputError(
            f"out_indices is {tuple(out_indices)}; model '{name}' has feature maps 0 to {count - 1}, "
            "to be named in rising order"
        )
    return indices
