"""The stage that learns which layers keep softmax attention."""

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from terrazzo.backbones._convert import convert_attention
from terrazzo.errors import InputError
from terrazzo.openmmlab.conversion.distil import DistilStage

if TYPE_CHECKING:
    from terrazzo.openmmlab.conversion.model import AttentionConversion

SHARE = "softmax_share"
"""The name of r among the parameters of a student's attention layers; configs give it a learning rate of its own."""

BEGIN, SURE = 0.6, 0.2  # where r begins, and how far from 0 or 1 it may end
POWERS, WEIGHTS = (10.0, 1.0), (0.1, 0.5)


class SelectStage(DistilStage):
    """Learns which of the converted layers keep softmax attention, and trains the mixers meanwhile.

    Each converted layer gives r * teacher's attention layer + (1 - r) * student's attention layer. The number r of a
    layer begins at 0.6 and is moved back to 0 or 1 if a step leads it out of that range. The loss is that of "distil"
    without labels, and

        weight * ((number of layers with r < 0.5 - target)^2 + sum over layers of (1 - |2r - 1|^power))

    where the number of layers has the gradient of the sum of 1 - r. The schedules take the first half of the training:
    power falls from 10 to 1 over its first quarter, and weight rises from 0.1 to 0.5 over the half. The training ends
    after that half, as soon as every r is closer than 0.2 to 0 or 1 and `target` of them are below 0.5. At the end, at
    the latest that of the training, the layers with the lowest r get the mixer, and all others the teacher's layer.
    In evaluation, the student is that student at any time. The log has `share0`, ...: r of each layer.

    Start with mixers that the stage "hidden" trained: an untrained mixer makes every layer look irreplaceable.

    Source: LinVideo, arXiv 2510.08318, selective transfer. Which form the first term has there could not be read. The
    schedules are ours: with a power above 1 at the end, r stays near 0.5.

    Args:
        target: How many of the converted layers get the mixer.
        **options: Options of the stage "distil", but for labels and for what is trained.
    """

    def __init__(self, target: int, **options: Any):
        if barred := sorted({"trained", "rank", "alpha", "task_weight"} & set(options)):
            raise InputError(
                f"stage 'select' trains the converted attention layers without labels: leave out {', '.join(barred)}"
            )
        super().__init__(trained="attention", **options)
        self.target = target

    def prepare(self, model: "AttentionConversion") -> None:
        super().prepare(model)
        if type(self.target) is not int or not 0 < self.target < len(model.layers):
            raise InputError(
                f"target is the number of layers that get the mixer, from 1 to {len(model.layers) - 1} of the "
                f"{len(model.layers)} that convert names, got {self.target!r}"
            )
        for layer in model.layers:
            attention = model.backbone.blocks[layer].attn
            like = next(attention.parameters())
            attention.register_parameter(SHARE, nn.Parameter(like.new_full((1,), BEGIN, dtype=torch.float32)))
            attention.register_forward_hook(_Blend(model, layer), with_kwargs=True)

    def losses(
        self, model: "AttentionConversion", images: Tensor, labels: Tensor | None, progress: float
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            for share in _parameters(model):
                share.clamp_(0, 1)
        terms = super().losses(model, images, None, progress)
        power, weight = schedule(progress)
        shares = torch.cat(list(_parameters(model)))
        terms["loss_count"] = weight * count_error(shares, self.target)
        terms["loss_doubt"] = weight * doubt(shares, power)
        return terms | {f"share{layer}": value for layer, value in zip(model.layers, shares.detach())}

    def done(self, model: "AttentionConversion", progress: float) -> bool:
        if progress < 0.5:
            return False
        shares = torch.cat(list(_parameters(model))).detach()
        sure = (shares.clamp(0, 1) - shares.clamp(0, 1).round()).abs() < SURE
        return bool(sure.all()) and int((shares < 0.5).sum()) == self.target

    def report(self, model: "AttentionConversion") -> str:
        shares = zip(model.layers, torch.cat(list(_parameters(model))).detach().clamp(0, 1).tolist())
        text = f"layers {list(self.chosen(model))} have the mixer, by the share of softmax attention: "
        text += ", ".join(f"{layer}: {share:.3f}" for layer, share in shares)
        return text if self.done(model, 1.0) else f"{text}; not all are near 0 or 1, so a longer training may differ"

    def chosen(self, model: "AttentionConversion") -> tuple[int, ...]:
        """The layers that get the mixer: those with the lowest r."""
        shares = torch.cat(list(_parameters(model))).detach()
        return tuple(sorted(model.layers[i] for i in shares.argsort(stable=True)[: self.target].tolist()))

    def finished(self, model: "AttentionConversion") -> nn.Module:
        chosen = self.chosen(model)
        rest = [layer for layer in model.layers if layer not in chosen]
        student: Any = copy.deepcopy(model.backbone, {id(model): model})  # the hooks know the model
        for layer in model.layers:
            attention = student.blocks[layer].attn
            delattr(attention, SHARE)
            attention._forward_hooks.clear()
            attention._forward_hooks_with_kwargs.clear()
        convert_attention(student, "softmax", layers=rest)
        for layer in rest:
            student.blocks[layer].attn.load_state_dict(model.teacher.blocks[layer].attn.state_dict())
        return student


class _Blend:
    """A hook of a student's attention layer, which mixes the teacher's layer in.

    It is a class, so that a copy of the model has hooks that know the copy.
    """

    def __init__(self, model: "AttentionConversion", layer: int):
        self.model, self.layer = model, layer

    def __call__(self, attention: nn.Module, inputs: tuple, options: dict[str, Any], output: Tensor) -> Tensor:
        model = self.model
        if not model.training and self.layer in model.stage.chosen(model):
            return output
        softmax = model.teacher.blocks[self.layer].attn(*inputs, **options)
        return torch.lerp(output, softmax, getattr(attention, SHARE).to(output.dtype)) if model.training else softmax


def schedule(progress: float) -> tuple[float, float]:
    """The power and the weight of the terms for r, when a share of the training is done."""
    done = 2 * progress
    power = POWERS[0] + (POWERS[1] - POWERS[0]) * min(2 * done, 1.0)
    return power, WEIGHTS[0] + (WEIGHTS[1] - WEIGHTS[0]) * min(done, 1.0)


def count_error(shares: Tensor, target: int) -> Tensor:
    """(number of shares that round to 0 - target)^2, with the gradient of a sum in place of a number."""
    rounded = shares + (shares.round() - shares).detach()
    return ((1 - rounded).sum() - target).square()


def doubt(shares: Tensor, power: float) -> Tensor:
    """Sum of 1 - |2r - 1|^power: how far shares r are from 0 and 1."""
    return (1 - (2 * shares - 1).abs().pow(power)).sum()


def _parameters(model: "AttentionConversion") -> Iterator[nn.Parameter]:
    return (getattr(model.backbone.blocks[layer].attn, SHARE) for layer in model.layers)
