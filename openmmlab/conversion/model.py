"""The mmengine model of a conversion: a frozen teacher, and the student that is made of it."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import MessageHub, print_log
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from timm.layers import trunc_normal_
from torch import Tensor, nn

from terrazzo.backbones._convert import convert_attention
from terrazzo.backbones._divergence import divergence, judged
from terrazzo.backbones._hosts import check_host, kind_of, make_host
from terrazzo.checkpoints.files import load_file
from terrazzo.checkpoints.loading import load_weights
from terrazzo.checkpoints.records import recorded
from terrazzo.errors import InputError
from terrazzo.openmmlab._timm import create_model
from terrazzo.openmmlab.conversion.forcing import forced
from terrazzo.openmmlab.conversion.losses import cosines, token_errors
from terrazzo.openmmlab.conversion.sharing import Aside, share, unshare
from terrazzo.openmmlab.conversion.stages import make_stage

DROPS = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
"""Arguments of timm's ViTs that make passes random, in which student and teacher would differ by chance."""


@MODELS.register_module()
class AttentionConversion(BaseModel):
    """Teaches a trained plain ViT to do without softmax attention in some layers.

    The student is the teacher with mixers in these layers. A training is one stage; `load_from` chains stages:

        matrix: matrices of mixers become like softmax attention's, layer by layer, at most 1024 tokens.
        hidden: outputs of attention layers become like the teacher's, layer by layer.
        select: learns which of the converted layers keep softmax attention; `target` layers get the mixer.
        distil: logits (or features, without a head) and tokens of the whole student become like the teacher's.

    Stages but "distil" need no labels, and "distil" can do without. A checkpoint has the student alone, with the record
    of its mixers. `TerrazzoBackbone(name=..., convert=...)` takes it as `checkpoint`. Checkpoints of "select", and of
    "distil" with adapters, have more than the student; there `StudentHook` writes the student as `student.pth`. The log
    has `error0`, ...: for each layer the relative error of the layer's tokens (of its matrix, in the stage "matrix"),
    and `front0`, ... the same of the class token and registers alone.

    Source: MOHAWK, arXiv 2408.10189; LinMU, arXiv 2601.01322.

    Args:
        teacher: `name` of a plain ViT of timm, with `checkpoint`, a file of weights, or `pretrained=True`; and other
            arguments of `timm.create_model`.
        convert: arguments of `terrazzo.convert_attention`, such as `dict(mixer="hedgehog", layers=[0, 1, 2])`; or
            several of these for different layers; or a checkpoint, whose record says it, such as the `student.pth`
            that the stage "select" leaves.
        stage: "matrix", "hidden", "select" or "distil"; or the name as `type` and the stage's options:
            `dict(type="hidden", target="block")`.
        init: "attention" starts converted layers from the teacher's projections; "random" from random projections.
        data_preprocessor: mmengine's; by default it only moves the batch to the device.
        init_cfg: mmengine's; the teacher sets the weights.

    Attributes:
        backbone: the student.
        layers: the converted layers.

    Raises:
        InputError: the teacher is no plain ViT or has no weights, no layer is converted, or a stage, a mixer or an
            option is not valid.
    """

    shardable = False  # layers run by themselves, and the teacher shares memory with the student

    def __init__(
        self,
        teacher: Mapping[str, Any],
        convert: Mapping[str, Any] | Sequence[Mapping[str, Any]] | str,
        stage: str | Mapping[str, Any] = "hidden",
        init: str = "attention",
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ):
        super().__init__(data_preprocessor, init_cfg)
        if init not in ("attention", "random"):
            raise InputError(f"init must be 'attention' or 'random', got {init!r}")
        self.stage = make_stage(stage)
        model = _teacher(teacher)
        self.backbone: Any = copy.deepcopy(model)
        for change in _changes(convert):
            try:
                convert_attention(self.backbone, **{key: value for key, value in change.items() if key != "_scope_"})
            except TypeError as error:
                raise InputError(f"convert={dict(change)} does not fit: {error}") from error
        self.layers = tuple(sorted(getattr(self.backbone, "conversion", ())))
        if not self.layers:
            raise InputError(f"convert={convert!r} converts no layer; name layers from 0 to {len(model.blocks) - 1}")
        if init == "random":
            for layer in self.layers:
                _begin_at_random(self.backbone.blocks[layer].attn)
        self.stage.prepare(self)
        self.backbone.requires_grad_(False)
        for parameter in self.stage.trained(self):
            parameter.requires_grad_(True)
        make_host(model)
        share(model, self.backbone)
        self.aside = Aside(model)
        self._register_load_state_dict_pre_hook(self._keep_teacher)

    @property
    def teacher(self) -> Any:
        """The teacher, a host with softmax attention in all layers."""
        return self.aside.model

    def forward(
        self,
        inputs: Tensor | list[Tensor],
        targets: Tensor | list | None = None,
        img_path: list[str] | None = None,
        mode: str = "tensor",
    ) -> Any:
        """Runs the student, or compares it with the teacher.

        Args:
            inputs: B 3 H W, or a list of B images.
            targets: B class indices, which stages without labels do not read.
            img_path: the files of the images, which the data loader brings for error messages.
            mode: "loss" gives the stage's terms; "predict" a list of B dicts for `Fidelity` and, with a head, for
                `ClassificationAccuracy`; "tensor" the student's logits or, without a head, features.
        """
        if isinstance(inputs, (list, tuple)):
            inputs = torch.stack(list(inputs))
        if targets is not None:
            targets = torch.as_tensor(targets, device=inputs.device)
        if mode == "loss":
            return self.stage.losses(self, inputs, targets, progress())
        if mode == "predict":
            return self._compared(inputs, targets)
        return self.backbone(inputs)

    def init_weights(self) -> None:
        """Leaves the weights as the teacher set them; mmengine would initialise them again."""
        self._is_init = True

    def _compared(self, images: Tensor, targets: Tensor | None) -> list[dict[str, Any]]:
        """For each image how far the student is from the teacher."""
        errors: list[dict[str, Tensor]] = [{} for _ in images]
        for given in forced(self.teacher, images, self.layers):
            attention = self.backbone.blocks[given.layer].attn
            found = attention(given.given, rope=given.rope, attn_mask=given.place)
            every = token_errors(found, given.attended)
            for sample, tokens in zip(errors, every):
                sample[f"error{given.layer}"] = tokens.mean()
                if given.place.prefix:
                    sample[f"front{given.layer}"] = tokens[: given.place.prefix].mean()
        own, wanted = (model.forward_features(images) for model in (self.backbone, self.teacher))
        cosine = cosines(own, wanted).mean(1)
        own, wanted = judged(self.backbone, own), judged(self.teacher, wanted)
        apart = divergence(own, wanted)
        apart = apart if apart.dim() == 1 else apart.mean(1)
        samples = [{"errors": e, "cosine": c, "kl": k} for e, c, k in zip(errors, cosine, apart)]
        if self.backbone.num_classes > 0:
            for sample, scores, label in zip(samples, own.float().softmax(-1), wanted.argmax(-1).tolist()):
                sample |= {"scores": scores, "pred_label": int(scores.argmax()), "teacher_label": label}
        if targets is not None:
            for sample, target in zip(samples, targets.tolist()):
                sample["gt_label"] = target
        return samples

    def _keep_teacher(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Called before weights are loaded: the teacher keeps its own where the student gets others.

        A file with the names of the ViT alone is taken, too, such as `terrazzo explain --save` writes.
        """
        if not any(key.startswith(f"{prefix}backbone.") for key in state):
            for key in [key for key in state if key.startswith(prefix)]:
                state[f"{prefix}backbone.{key.removeprefix(prefix)}"] = state.pop(key)
        count = unshare(self.teacher, self.backbone, state, f"{prefix}backbone.")
        if count:
            print_log(
                f"{count} tensors that this stage does not train differ from the teacher's in the loaded file, as "
                "after the stage 'distil': the teacher keeps its own",
                logger="current",
            )


def progress() -> float:
    """The share of the running training's steps that are done; 0 outside of a training."""
    hub = MessageHub.get_current_instance()
    total = hub.get_info("max_iters", None)
    return hub.get_info("iter", 0) / total if total else 0.0


def _teacher(settings: Mapping[str, Any]) -> nn.Module:
    options = {key: value for key, value in dict(settings or {}).items() if key != "_scope_"}
    name, checkpoint = options.pop("name", None), options.pop("checkpoint", None)
    if not isinstance(name, str):
        raise InputError(f"teacher is {options}; it needs the name of a plain ViT of timm")
    if checkpoint is not None:
        options["pretrained"] = False
    elif not options.get("pretrained"):
        raise InputError(f"teacher '{name}' has no weights: set pretrained=True, or name a file as checkpoint")
    if drops := {key: options[key] for key in DROPS if options.get(key)}:
        raise InputError(f"teacher '{name}' is compared without dropping anything: leave out {', '.join(drops)}")
    model: Any = create_model(name, **options)
    check_host(model, "converted")
    if kind_of(model) is not type(model):
        raise InputError(f"teacher '{name}' is converted or reduced already; it must have softmax attention everywhere")
    if checkpoint is not None:
        load_weights(model, name, checkpoint)
    return model


def _changes(convert: Mapping[str, Any] | Sequence[Mapping[str, Any]] | str) -> list[Mapping[str, Any]]:
    """Arguments of `convert_attention`, one call after another."""
    if not isinstance(convert, str):
        return [convert] if isinstance(convert, Mapping) else list(convert or ())
    found = recorded(load_file(convert, "cpu"), convert).get("convert")
    if not found:
        raise InputError(f"convert names the file '{convert}', which has no record of mixers; name mixer and layers")
    return [dict(mixer=entry["mixer"], layers=entry["layers"], **entry["options"]) for entry in found]


def _begin_at_random(attention: nn.Module) -> None:
    """Give an attention layer random projections, as timm does at the start of a training."""
    for layer in attention.children():
        if isinstance(layer, nn.Linear):
            trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
