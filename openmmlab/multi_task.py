"""Several tasks on one backbone: mmseg's models, each with its head, share a backbone that routes tokens by task."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.model import BaseModel, BaseModule
from mmengine.registry import MODELS, TRANSFORMS
from torch import Tensor, nn

from terrazzo.backbones.m3vit import M3ViT, UpHead
from terrazzo.errors import InputError
from terrazzo.openmmlab.backbone import TerrazzoBackbone


@MODELS.register_module()
class TaskBackbone(nn.Module):
    """The shared backbone of a `MultiTask`, as one of its tasks sees it. It owns no parameters."""

    def __init__(self, task: str):
        super().__init__()
        self.task = task
        self.shared: tuple[TerrazzoBackbone, ...] = ()  # a tuple, so that PyTorch finds the parameters in one place
        self.balance: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The maps of this task. In training, `balance` becomes the load-balancing loss of this pass."""
        (backbone,) = self.shared
        routing = backbone.model.routing(self.task, balance=self.training)
        maps = backbone(x, routing=routing)
        self.balance = routing.balance
        return maps

    def take_balance(self) -> Tensor | None:
        """The load-balancing loss of the last pass, which is then forgotten, and with it the pass's graph."""
        found, self.balance = self.balance, None
        return found


@MODELS.register_module()
class MultiTask(BaseModel):
    """Models of mmseg for several tasks on one M3ViT: a segmentor, a depth estimator, ...

    A training step adds up the losses of all tasks, each with its own pass through the backbone. In prediction, a
    sample gets the results of all tasks, so mmseg's metrics of each task read their results.

    Args:
        backbone: a `TerrazzoBackbone` of an M3ViT.
        tasks: for each of the backbone's tasks, a model of mmseg without its backbone, for example
            `dict(type="EncoderDecoder", decode_head=...)` or `dict(type="DepthEstimator", decode_head=...)`.
        balance: the weight of the load-balancing losses.
        data_preprocessor: mmengine's, for example mmseg's `SegDataPreProcessor`.
        init_cfg: mmengine's.

    Raises:
        InputError: the backbone is no M3ViT, or has other tasks.
    """

    def __init__(
        self,
        backbone: dict,
        tasks: Mapping[str, dict],
        balance: float = 0.01,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ):
        super().__init__(data_preprocessor, init_cfg)
        self.backbone = MODELS.build(backbone)
        model = getattr(self.backbone, "model", None)
        if not isinstance(model, M3ViT):
            raise InputError(
                f"MultiTask needs a TerrazzoBackbone of an M3ViT, for example m3vit_tiny, got {dict(backbone)}"
            )
        if {*tasks} != {*model.tasks}:
            raise InputError(
                f"MultiTask has the tasks {', '.join(tasks)}, and its backbone has {', '.join(model.tasks)}; "
                "name the same tasks in both"
            )
        self.tasks = nn.ModuleDict()
        for task in model.tasks:
            self.tasks[task] = MODELS.build({**tasks[task], "backbone": dict(type="TaskBackbone", task=task)})
            self.tasks[task].backbone.shared = (self.backbone,)
        self.balance = balance

    def forward(
        self, inputs: Tensor, data_samples: list | None = None, mode: str = "tensor", task: str | None = None
    ) -> Any:
        """Args:
        inputs: B 3 H W.
        data_samples: mmseg's samples, with the truths of all tasks in mode "loss".
        mode: "loss" gives losses by name, "predict" a list of samples, "tensor" the heads' outputs.
        task: the only task to run; None for all. With one task, mode "tensor" gives a tensor, else a dict of tensors.

        Raises:
            InputError: the model does not have the task.
        """
        chosen = list(self._chosen(task))
        if mode == "loss":
            return self._losses(chosen, inputs, data_samples)
        if mode == "predict":
            return self._predictions(chosen, inputs, data_samples)
        found = {name: model(inputs, data_samples, mode="tensor") for name, model in chosen}
        return found if task is None else found[task]

    def _chosen(self, task: str | None) -> Iterator[tuple[str, nn.Module]]:
        if task is not None and task not in self.tasks:
            raise InputError(f"task must be one of {', '.join(self.tasks)}, got {task!r}")
        for name, model in self.tasks.items():
            if task in (None, name):
                yield name, model

    def _losses(self, chosen: list[tuple[str, nn.Module]], inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for task, model in chosen:
            losses |= {f"{task}.{name}": value for name, value in model.loss(inputs, data_samples).items()}
            balance = model.backbone.take_balance()
            if balance is not None:
                losses[f"{task}.loss_balance"] = self.balance * balance
        return losses

    def _predictions(self, chosen: list[tuple[str, nn.Module]], inputs: Tensor, data_samples: list | None) -> list:
        found: list = []
        for _, model in chosen:
            samples = model.predict(inputs, data_samples)
            for sample, other in zip(found, samples):
                if sample is not other:
                    sample.set_data(dict(other.items()))
            found = found or list(samples)
        return found


@MODELS.register_module()
class M3ViTHead(BaseModule):
    """The decoder of M3ViT's authors as a decode head of mmseg's `EncoderDecoder`.

    Args:
        in_channels: the channels of the backbone's map, which is not normalised; a list with one number, too.
        num_classes: the number of classes.
        loss_decode: a loss of mmseg.
        ignore_index: the label without a class.
        width: the channels of the decoder.
        init_cfg: mmengine's.
    """

    align_corners = False
    truth = "gt_sem_seg"

    def __init__(
        self,
        in_channels: int | list[int],
        num_classes: int,
        loss_decode: dict | None = None,
        ignore_index: int = 255,
        width: int = 256,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        self.in_channels = [in_channels] if isinstance(in_channels, int) else list(in_channels)
        self.num_classes = self.out_channels = num_classes
        self.ignore_index = ignore_index
        self.decoder = UpHead(self.in_channels[-1], num_classes, width)
        self.loss_decode: Any = None if loss_decode is None else MODELS.build(loss_decode)

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The last map to (B, classes, 16 h, 16 w), which covers the image and its padding to whole patches."""
        return self.decoder(inputs[-1])

    def predict(self, inputs: tuple[Tensor, ...], batch_img_metas: list[dict], test_cfg: Any) -> Tensor:
        """The output at the size of the image."""
        meta = batch_img_metas[0]  # as in mmseg: the size of a window, of the padded batch, or of the image
        window = isinstance(meta["img_shape"], torch.Size) or not meta.get("pad_shape")
        height, width = (meta["img_shape"] if window else meta["pad_shape"])[:2]
        return self(inputs)[..., :height, :width]

    def loss(self, inputs: tuple[Tensor, ...], batch_data_samples: list, train_cfg: Any) -> dict[str, Tensor]:
        """The losses of a batch by name."""
        truth = torch.stack([getattr(sample, self.truth).data for sample in batch_data_samples])
        out = self(inputs)[..., : truth.shape[-2], : truth.shape[-1]]
        return self.losses(out, truth)

    def losses(self, out: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """The losses of an output (B, classes, H, W) and its truth (B, 1, H, W)."""
        return {self.loss_decode.loss_name: self.loss_decode(out, truth.squeeze(1), ignore_index=self.ignore_index)}


@MODELS.register_module()
class M3ViTDepthHead(M3ViTHead):
    """The decoder of M3ViT's authors as a decode head of mmseg's `DepthEstimator`; the loss is L1, as theirs.

    Pixels without a depth have the value 0, or 255 in mmseg's padding.

    Args:
        in_channels, width: see `M3ViTHead`.
        loss_weight: the weight of the loss.
        init_cfg: mmengine's.
    """

    truth = "gt_depth_map"

    def __init__(
        self,
        in_channels: int | list[int],
        loss_weight: float = 1.0,
        width: int = 256,
        init_cfg: dict | None = None,
    ):
        super().__init__(in_channels, 1, width=width, init_cfg=init_cfg)
        self.loss_weight = loss_weight

    def losses(self, out: Tensor, truth: Tensor) -> dict[str, Tensor]:
        known = (truth > 0) & (truth != self.ignore_index)
        error = torch.where(known, (out.float() - truth).abs(), 0.0)
        return {"loss_depth": self.loss_weight * error.sum() / known.sum().clamp(min=1)}


@TRANSFORMS.register_module()
class DepthBeside:
    """Finds the depth map of a picture by its path, for mmseg's `LoadDepthAnnotation`.

    Args:
        replace: pairs of texts: each first text in the picture's path becomes the second, for example
            `(("leftImg8bit", "disparity"),)` for Cityscapes.

    Raises:
        InputError: a path does not contain a text.
    """

    def __init__(self, replace: tuple[tuple[str, str], ...]):
        self.replace = tuple(map(tuple, replace))

    def __call__(self, results: dict) -> dict:
        """Adds `depth_map_path` to mmseg's results."""
        path = results["img_path"]
        for old, new in self.replace:
            if old not in path:
                raise InputError(f"the path {path} has no {old!r}, which DepthBeside is to replace by {new!r}")
            path = path.replace(old, new)
        return {**results, "depth_map_path": path}
