"""Image classification with timm's models and losses, driven by mmengine's runner."""

from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from terrazzo.backbones._hosts import ADDED
from terrazzo.checkpoints.loading import load_weights
from terrazzo.errors import InputError
from terrazzo.openmmlab._timm import create_model

LOSSES = {
    loss.__name__: loss
    for loss in (BinaryCrossEntropy, nn.CrossEntropyLoss, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy)
}


@MODELS.register_module()
class Classifier(BaseModel):
    """A timm classifier as an mmengine model.

    Args:
        backbone: `name`, `num_classes` and any other argument of `timm.create_model`; also `checkpoint`, a file of
            weights; its classifier is left out if it has other classes; also `reduce` and `convert`, as in
            `TerrazzoBackbone`.
        probe: whether to train only the last layer, on frozen features: a linear probe.
        loss: `type` (BinaryCrossEntropy, CrossEntropyLoss, LabelSmoothingCrossEntropy or SoftTargetCrossEntropy) and
            its arguments. By default LabelSmoothingCrossEntropy, or SoftTargetCrossEntropy with mixup.
        mixup: arguments of `timm.data.Mixup`, for mixup and CutMix; None for neither.
        recipe: `type` (`TokenConsistency` or `TokenBudget`) and its arguments, for families that train with more than
            the loss of the logits.
        data_preprocessor: mmengine's; by default it only moves the batch to the device.
        init_cfg: mmengine's; timm and `checkpoint` set the weights.

    Raises:
        InputError: if the model or loss is unknown, the number of classes is missing, or the recipe is for another
            family.
    """

    def __init__(
        self,
        backbone: dict,
        loss: dict | None = None,
        mixup: dict | None = None,
        probe: bool = False,
        recipe: dict | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ):
        super().__init__(data_preprocessor, init_cfg)
        options: dict[str, Any] = dict(backbone)
        options.pop("_scope_", None)
        name, checkpoint = options.pop("name", None), options.pop("checkpoint", None)
        classes = options.get("num_classes")
        if not name or not classes:
            raise InputError(f"Classifier.backbone is {dict(backbone)}; it needs a name and num_classes of 1 or more")
        self.backbone = create_model(name, **options)
        if checkpoint is not None:
            head = "|".join(rf"^{part}\." for part in _head_names(self.backbone))
            load_weights(self.backbone, name, checkpoint, optional=f"{head}|{ADDED}")
        self.probe = probe
        if probe:
            self.backbone.requires_grad_(False)
            for part in _head_names(self.backbone):
                self.backbone.get_submodule(part).requires_grad_(True)
        self.mixup = Mixup(num_classes=classes, **mixup) if mixup else None
        default = "SoftTargetCrossEntropy" if mixup else "LabelSmoothingCrossEntropy"
        arguments = dict(loss or {"type": default})
        arguments.pop("_scope_", None)
        kind = arguments.pop("type", default)
        if kind not in LOSSES:
            raise InputError(f"loss '{kind}' is unknown; choose one of {', '.join(LOSSES)}")
        if mixup and kind == "LabelSmoothingCrossEntropy":
            raise InputError("mixup makes soft targets; use SoftTargetCrossEntropy, and Mixup's own label_smoothing")
        self.loss = LOSSES[kind](**arguments)
        self.recipe = MODELS.build(recipe) if recipe else None
        if self.recipe is not None:
            if probe:
                raise InputError("probe trains only the last layer, and recipe the whole model; choose one of them")
            self.recipe.prepare(
                self.backbone, name=name, checkpoint=checkpoint, pretrained=options.get("pretrained", False)
            )

    def forward(
        self,
        inputs: Tensor | list[Tensor],
        targets: Tensor | list | None = None,
        img_path: list[str] | None = None,
        mode: str = "tensor",
    ) -> Any:
        """Classifies images.

        Args:
            inputs: B 3 H W, or a list of B images.
            targets: B class indices.
            img_path: the files of the images, which the data loader brings for error messages.
            mode: "loss" gives `{"loss": ...}`, or the recipe's terms; "predict" a list of B dicts with `scores`
                (probabilities of each class), `pred_label` and, with targets, `gt_label`; "tensor" the logits, B x
                classes.
        """
        if isinstance(inputs, (list, tuple)):
            inputs = torch.stack(list(inputs))
        if targets is not None:
            targets = torch.as_tensor(targets, device=inputs.device)
        if mode == "loss":
            return self._losses(inputs, targets)
        logits = self.backbone(inputs)
        if mode == "tensor":
            return logits
        samples = [{"scores": scores, "pred_label": int(scores.argmax())} for scores in logits.float().softmax(dim=-1)]
        if targets is not None:
            for sample, target in zip(samples, targets.tolist()):
                sample["gt_label"] = target
        return samples

    def train(self, mode: bool = True) -> "Classifier":
        """Switches between training and evaluation; a probed backbone stays in evaluation mode."""
        super().train(mode)
        if self.probe:
            self.backbone.eval()
        return self

    def init_weights(self) -> None:
        """Leaves the weights as timm or the checkpoint set them; mmengine would initialise them again."""
        self._is_init = True

    def _losses(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The losses of a training batch, mixed if so configured."""
        labels = targets[:, None]
        if self.mixup is not None:
            if len(inputs) % 2:
                raise InputError(
                    f"mixup pairs images, and this batch has {len(inputs)}; use an even batch_size and drop_last=True"
                )
            labels = torch.stack([targets, targets.flip(0)], 1)  # what timm mixes
            inputs, targets = self.mixup(inputs, targets)
        if self.recipe is None:
            return {"loss": self.loss(self.backbone(inputs), targets)}
        return self.recipe.losses(self.backbone, inputs, labels, lambda logits: self.loss(logits, targets))


def _head_names(model: nn.Module) -> list[str]:
    """The names of a timm model's classifier layers."""
    names = model.pretrained_cfg.get("classifier") or "head"
    return [names] if isinstance(names, str) else list(names)
