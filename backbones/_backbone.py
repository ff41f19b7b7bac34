"""timm's model interface, implemented once for hierarchical (`_pyramid`) and isotropic (`_plain`) backbones."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import nn

from terrazzo.backbones._checks import check_image
from terrazzo.backbones._head import Head
from terrazzo.backbones._weights import load_strictly
from terrazzo.errors import InputError


class Backbone(nn.Module):
    """A stem, a list of units, a norm and a classifier head.

    Features are taken after units: the stages of a pyramid, or the blocks of a plain backbone. Units and blocks have
    one interface, `block(x, state) -> x`. `x` is the map in `map_fmt`. `state` is an object with the data that a
    family carries beside the map (global tokens, a record of merged tokens), or None. Each forward pass makes a new
    state, and blocks change it in place, so that modules return tensors only. `begin` makes map and state from the
    image, `to_map` turns both into an output map, `to_features` into the head's input. A family with a state, a
    `_states.Beside`, overrides these three methods as needed.

    Attributes:
        map_fmt: Layout of maps between units, "NHWC" or "NCHW".
        output_fmt: Layout of maps from `forward_features`, and of the head without pooling; by default `map_fmt`.
        gives_tokens: Whether `forward_features` gives tokens (B, T, C), and no map.
        feature_info: Per unit, channels, reduction and module name, as timm defines it.
        no_decay: Last parts of the names of parameters without weight decay.
    """

    map_fmt = "NHWC"
    gives_tokens = False
    no_decay: tuple[str, ...] = ()
    units_name: str  # the attribute that holds the units, so that state dicts say "stages" or "blocks"

    def __init__(
        self,
        stem: nn.Module,
        units: Sequence[nn.Module],
        channels: Sequence[int],
        reductions: Sequence[int],
        norm_layer: Callable[..., nn.Module],
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        norm_outputs: bool = False,
        output_fmt: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Args:
        stem: Maps the image to the first map, in `map_fmt`.
        units, channels, reductions: The units, and the channels and total stride after each unit.
        norm_layer: Called with a channel count: makes the norm before the head, and the norms of the outputs.
        norm_outputs: Make the variant for detectors and segmentors: `forward_intermediates` and `features_only` return
            maps normalised by `norm0`, `norm1`, ..., and there is no norm before the head.
        output_fmt: Layout of the map from `forward_features`, "NHWC" or "NCHW", a view; None for the family's own.

        Raises:
            InputError: `output_fmt` is another text.
        """
        super().__init__()
        if output_fmt is not None:
            _check_format(output_fmt)
        self.output_fmt = self.map_fmt if output_fmt is None else output_fmt
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.norm_outputs = norm_outputs
        self.grad_checkpointing = False
        self.num_features = channels[-1]
        self.feature_info = [
            dict(num_chs=c, reduction=r, module=f"{self.units_name}.{i}")
            for i, (c, r) in enumerate(zip(channels, reductions))
        ]
        factory = dict(device=device, dtype=dtype)
        self.stem = stem
        setattr(self, self.units_name, nn.ModuleList(units))
        self.norm = nn.Identity() if norm_outputs else norm_layer(channels[-1], **factory)
        if norm_outputs:
            for i, c in enumerate(channels):
                setattr(self, f"norm{i}", norm_layer(c, **factory))
        # In the layout of the features, because lightly-train applies the head's `global_pool` to them itself.
        self.head = Head(
            channels[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt, **factory
        )

    @property
    def units(self) -> nn.ModuleList:
        return getattr(self, self.units_name)

    @property
    def head_hidden_size(self) -> int:
        """Channels of the output of `forward_head(..., pre_logits=True)`."""
        return self.head.num_features

    def begin(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Make the first map and the state beside it from the image."""
        return self.stem(x), None

    def run_unit(self, unit: nn.Module, x: torch.Tensor, state: Any) -> torch.Tensor:
        """Run a unit on the map; the unit may change the state."""
        return unit(x, state)

    def to_map(self, x: torch.Tensor, state: Any) -> torch.Tensor:
        """The output map, (B, H, W, C) or (B, C, H, W) according to `map_fmt`."""
        return x

    def to_features(self, x: torch.Tensor, state: Any) -> torch.Tensor:
        """The head's input: the last map, normalised, in `map_fmt`."""
        return self.norm(self.to_map(x, state))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) to the head's input, by default the last map, normalised, in `output_fmt`."""
        check_image(x, self.in_chans)
        x, state = self.begin(x)
        for unit in self.units:
            x = self.run_unit(unit, x, state)
        return self._turned(self.to_features(x, state), self.map_fmt, self.output_fmt)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The output of `forward_features` to logits (B, num_classes), without pooling in the layout of `x`."""
        x = self.head(self._turned(x, self.output_fmt, self.head.input_fmt), pre_logits=pre_logits)
        return self._turned(x, self.head.input_fmt, self.output_fmt)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **choices,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """The maps after the chosen units, and the output of `forward_features`.

        Args:
            x: (B, in_chans, H, W).
            indices: The last n units if an int, all if None, else the units' numbers.
            norm: Also apply the final norm to the last unit's map (it fits no other map).
            stop_early: Do not run the units after the last chosen unit.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: Return the list alone.
            **choices: Further arguments of the family's `begin`, for one forward pass.

        Raises:
            InputError: `output_fmt` is neither "NCHW" nor "NHWC".
        """
        _check_format(output_fmt)
        taken, last = feature_take_indices(len(self.units), indices)
        maps = []
        check_image(x, self.in_chans)
        x, state = self.begin(x, **choices)
        for i, unit in enumerate(self.units):
            if stop_early and i > last:
                break
            x = self.run_unit(unit, x, state)
            if i in taken:
                y = self.to_map(x, state)
                if self.norm_outputs:
                    y = getattr(self, f"norm{i}")(y)
                elif norm and i == len(self.units) - 1:
                    y = self.norm(y)
                turned = self._turned(y, self.map_fmt, output_fmt)
                maps.append(y if turned is y else turned.contiguous())
        if intermediates_only:
            return maps
        return self._turned(self.to_features(x, state), self.map_fmt, self.output_fmt), maps

    @staticmethod
    def _turned(x: torch.Tensor, given: str, wanted: str) -> torch.Tensor:
        """A map in another layout, as a view; tokens and logits stay as they are."""
        if given == wanted or x.dim() != 4:
            return x
        return x.permute(0, 3, 1, 2) if wanted == "NCHW" else x.permute(0, 2, 3, 1)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove modules that the chosen intermediates do not need; returns their numbers, counted from the front."""
        taken, last = feature_take_indices(len(self.units), indices)
        cut = last < len(self.units) - 1
        setattr(self, self.units_name, self.units[: last + 1])
        if cut:
            self.num_features = self.feature_info[last]["num_chs"]
        if self.norm_outputs:
            for i in range(len(self.feature_info)):
                if i not in taken and hasattr(self, f"norm{i}"):
                    delattr(self, f"norm{i}")
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
        return taken

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Like PyTorch's. If strict, it also takes official checkpoints, and names with a prefix: see `load_strictly`.

        So does `timm.create_model(name, checkpoint_path=...)`, which reads a file and calls this method.

        Raises:
            WeightsError: the weights do not fit.
        """
        load = partial(super().load_state_dict, strict=strict, assign=assign)
        return load_strictly(self, state_dict, load) if strict else load(state_dict)

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier (0 removes it); the pooling stays unless `global_pool` is given."""
        self.num_classes = num_classes
        parameter = next(self.parameters())
        self.head.in_features = self.num_features
        self.head.reset(num_classes, global_pool, device=parameter.device, dtype=parameter.dtype)
        self.head.train(self.training)  # a new layer would be in training mode

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in self.no_decay}


def _check_format(output_fmt: str) -> None:
    if output_fmt not in ("NCHW", "NHWC"):
        raise InputError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
