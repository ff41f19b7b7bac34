"""Restoration of pictures, the fourth head: any restoration network, or any pyramid with a U-shaped decoder."""

from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from terrazzo._settings import built, check_arguments, plain
from terrazzo.checkpoints.loading import load_weights
from terrazzo.errors import InputError
from terrazzo.openmmlab._timm import create_model
from terrazzo.restoration._reflection import lengthened


class CharbonnierLoss(nn.Module):
    """The mean of sqrt((x - y)^2 + eps^2), a smooth L1 (LapSRN, arXiv 1704.03915).

    Args:
        eps: for values in 0..1.
    """

    def __init__(self, eps: float = 1e-3):
        super().__init__()
        self.eps = eps

    def forward(self, found: Tensor, truth: Tensor) -> Tensor:
        """A number, from two tensors of one shape."""
        return torch.sqrt((found - truth) ** 2 + self.eps**2).mean()


LOSSES = {loss.__name__: loss for loss in (nn.L1Loss, CharbonnierLoss)}


@MODELS.register_module()
class Restorer(BaseModel):
    """A network from degraded pictures to restored pictures, as an mmengine model.

    Args:
        backbone: `name` and any other argument of `timm.create_model`; also `checkpoint`, a file of weights. Without a
            neck, the name is of a restoration network: from (B, 3, H, W) to (B, 3, s H, s W), with an attribute
            `upscale`, which is s. With a neck, these are the arguments of `TerrazzoBackbone`, and the name is of any
            pyramid.
        neck: `type`, by default RestorerUNet, and its arguments without `in_channels` and `strides`, which are the
            backbone's.
        loss: `type` (L1Loss or CharbonnierLoss) and its arguments; by default L1Loss.
        data_preprocessor: mmengine's; by default it only moves the batch to the device.
        init_cfg: mmengine's; timm and `checkpoint` set the weights.

    Attributes:
        upscale: how many times larger restored pictures are.

    Raises:
        InputError: the model, the neck, the loss or an argument is unknown, or the model does not restore pictures.
    """

    def __init__(
        self,
        backbone: dict,
        neck: dict | None = None,
        loss: dict | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ):
        super().__init__(data_preprocessor, init_cfg)
        options: dict[str, Any] = {key: value for key, value in backbone.items() if key not in ("_scope_", "type")}
        if not options.get("name"):
            raise InputError(f"Restorer.backbone is {dict(backbone)}; it needs the name of a model")
        if neck is None:
            name, checkpoint = options.pop("name"), options.pop("checkpoint", None)
            self.backbone = create_model(name, **options)
            if not isinstance(getattr(self.backbone, "upscale", None), int):
                raise InputError(
                    f"model '{name}' does not restore pictures; name a restoration network, or give a "
                    'neck=dict(type="RestorerUNet")'
                )
            if checkpoint is not None:
                load_weights(self.backbone, name, checkpoint)
            self.neck, self.upscale = None, self.backbone.upscale
        else:
            self.backbone = MODELS.build({**options, "type": "TerrazzoBackbone"})
            self.neck = _neck(neck, self.backbone)
            self.upscale = self.neck.upscale
            data = resolve_model_data_config(self.backbone.model)
            for key in ("mean", "std"):
                self.register_buffer(key, torch.tensor(data[key])[:, None, None], persistent=False)
        self.loss = built("loss", LOSSES, {} if loss is None else loss, default="L1Loss")

    def forward(
        self,
        inputs: Tensor | list[Tensor],
        targets: Tensor | list[Tensor] | None = None,
        img_path: list[str] | None = None,
        mode: str = "tensor",
    ) -> Any:
        """Restores pictures.

        Args:
            inputs: degraded pictures, (B, 3, H, W) in about 0..1; for "predict", a list of B pictures of any sizes,
                too.
            targets: the truth, (B, 3, s H, s W), or a list.
            img_path: the files of the pictures, which the data loader brings for error messages and reports.
            mode: "loss" gives `{"loss": ...}`; "predict" a list of B dicts with `degraded` and `restored`, (3, H, W)
                and (3, s H, s W), and, with targets, `target` and, with paths, `img_path`; "tensor" the restored
                pictures (B, 3, s H, s W).
        """
        if mode == "predict":
            return self._samples(inputs, targets, img_path)
        inputs, targets = (_stacked(value) for value in (inputs, targets))
        found = self.restore(inputs)
        if mode != "loss":
            return found
        if found.shape != targets.shape:
            raise InputError(
                f"the model enlarges {self.upscale} times, and the truth is {tuple(targets.shape[2:])} for "
                f"{tuple(inputs.shape[2:])}; set degradation.scale or neck.upscale"
            )
        return {"loss": self.loss(found, targets)}

    def restore(self, x: Tensor) -> Tensor:
        """From (B, 3, H, W) of any H and W to (B, 3, s H, s W)."""
        if self.neck is None:
            return self.backbone(x)
        height, width = x.shape[-2:]
        x = lengthened(lengthened(x, -2, self.neck.stride), -1, self.neck.stride)
        found = self.neck(x, self.backbone((x - self.mean) / self.std))
        return found[..., : height * self.upscale, : width * self.upscale]

    def init_weights(self) -> None:
        """Leaves the weights as timm or the checkpoint set them; mmengine would initialise them again."""
        self._is_init = True

    def _samples(
        self, inputs: Tensor | list[Tensor], targets: Tensor | list[Tensor] | None, img_path: list[str] | None
    ) -> list[dict]:
        alike = isinstance(inputs, Tensor) or len({one.shape for one in inputs}) == 1
        restored = self.restore(_stacked(inputs)) if alike else [self.restore(one[None])[0] for one in inputs]
        samples = [{"degraded": one, "restored": found.float()} for one, found in zip(inputs, restored)]
        for key, values in (("target", targets), ("img_path", img_path)):
            for sample, value in zip(samples, values if values is not None else ()):
                sample[key] = value
        return samples


def _neck(settings: dict, backbone: nn.Module) -> nn.Module:
    """The neck of these settings, on a `TerrazzoBackbone`.

    Raises:
        InputError: the type or an argument is unknown, or an argument is the backbone's.
    """
    arguments = plain("neck", settings)
    own = {"in_channels": backbone.out_channels, "strides": backbone.strides}
    taken = [key for key in own if key in arguments]
    if taken:
        raise InputError(f"the neck takes {taken[0]} from the backbone: leave it out")
    name = arguments.pop("type", "RestorerUNet")
    kind = MODELS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise InputError(f"the neck {name!r} is unknown; RestorerUNet is one")
    check_arguments(f"neck {name}", kind, {**arguments, **own})
    return kind(**arguments, **own)


def _stacked(values: Tensor | list[Tensor] | None) -> Tensor | None:
    return torch.stack(list(values)) if isinstance(values, (list, tuple)) else values
