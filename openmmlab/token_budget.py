"""AS-ViT's fine-tuning: thresholds learn to keep as many tokens as a budget allows; the full network is the teacher.

Source: arXiv 2209.13802, section 3.3. The authors' published training does not run: the model returns names that it
never defines, it returns six values where the loss takes five, and two files import classes that do not exist. The code
here follows the paper's formulas.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from terrazzo.backbones._deit import DeiT
from terrazzo.backbones._divergence import divergence
from terrazzo.backbones._lvvit import LVViT
from terrazzo.backbones._plain import PlainViT
from terrazzo.backbones._tokens import Reducer
from terrazzo.backbones.asvit import Pruning
from terrazzo.checkpoints.loading import load_weights
from terrazzo.errors import InputError


def cost(backbone: DeiT | LVViT, grid: tuple[int, int], tokens: Sequence[Tensor | float]) -> Tensor | float:
    """Multiply-adds of an image in G, as the authors' loss counts them: patches and blocks, no classifier.

    Args:
        grid: rows and columns of the patches.
        tokens: for each block, the number of tokens that it runs on: numbers, or tensors (B,).
    """
    dim, patches = backbone.num_features, grid[0] * grid[1]
    if isinstance(backbone, LVViT):
        attn, mlp = backbone.blocks[0].attn, backbone.blocks[0].mlp
        heads, hidden, width = attn.num_heads, mlp.fc1.out_features, backbone.stem.patches.conv1.out_channels
        # At half the image's size, a patch has 64 positions: three convolutions, and the convolution to patches.
        stem = 64 * patches * width * (49 * backbone.in_chans + 2 * 9 * width + dim)
        linear, square = 4 * dim**2 + 2 * dim * hidden + 14 * dim + 9 * hidden, 2 * dim + 6 * heads
    else:
        stem = patches * dim * backbone.in_chans * backbone.feature_info[0]["reduction"] ** 2
        linear, square = 12 * dim**2, 2 * dim
    return (stem + sum(linear * n + square * n**2 for n in tokens)) / 1e9


@MODELS.register_module()
class TokenBudget:
    """A `recipe` of `Classifier`: a budget for the mean cost of a batch, and distillation from the full network.

        loss + weight * |mean cost - budget * full cost| + distillation * KL(teacher, student)

    with costs in G of multiply-adds (`cost`). The full cost leaves out the class token, as in the authors' code, so a
    budget of 1 is missed by half a percent. The mean is over the images of a process. For LV-ViT, the labels train only
    the class token's logits; the logits of its second classifier for each kept patch are distilled, too, with the same
    weight.

    The teacher is the same network without dropping, and it is frozen. Its weights are the model's initial weights.
    Checkpoints do not hold them: a resumed run reads them again.

    Do not clip gradients: a threshold's gradient is large and rare, and Adam's step is the learning rate anyway.

    Args:
        budget: the share of the full cost to keep, 0 to 1.
        weight: weight of the budget's term; costs are in G, so its effect depends on the size of the model.
        distillation: weight of the distillation; 0 for no teacher.
        teacher: a file of the full network's weights; by default the weights from `backbone.checkpoint` or
            `backbone.pretrained`.

    Raises:
        InputError: the budget is out of range.
    """

    def __init__(self, budget: float, weight: float = 2.0, distillation: float = 0.5, teacher: str | None = None):
        if not 0 < budget <= 1:
            raise InputError(f"budget must be above 0 and at most 1, got {budget}")
        self.budget = budget
        self.weight = weight
        self.distillation = distillation
        self.file = teacher
        self.teacher: PlainViT | None = None

    def prepare(self, backbone: nn.Module, name: str, checkpoint: str | None = None, pretrained: bool = False) -> None:
        """Makes the teacher.

        Args:
            backbone: the model, with its initial weights.
            name: its registered name.
            checkpoint, pretrained: where the weights come from.

        Raises:
            InputError: the model drops no tokens by thresholds, or the teacher would have no weights or other classes.
        """
        reducer = getattr(backbone, "reducer", None)
        if not isinstance(reducer, Pruning) or reducer.form not in ("auto", "masked"):
            form = f" of form {reducer.form!r}" if isinstance(reducer, Pruning) else ""
            raise InputError(
                f"TokenBudget trains the thresholds of AS-ViT, with form 'auto' or 'masked', and the model is "
                f"{type(backbone).__name__}{form}; see recipe"
            )
        if self.distillation == 0:
            return
        file = self.file or checkpoint
        fits = pretrained and backbone.num_classes == backbone.pretrained_cfg["num_classes"]
        if file is None and not fits:
            raise InputError(
                f"TokenBudget distils from the full network, and no weights of '{name}' with {backbone.num_classes} "
                "classes are named; set backbone.checkpoint or recipe.teacher to a file of a plain ViT that was "
                "trained for them, or recipe.distillation=0"
            )
        teacher: Any = copy.deepcopy(backbone)
        teacher.reducer = Reducer()
        if file is not None:
            load_weights(teacher, name, file)
        self.teacher = teacher.eval().requires_grad_(False)

    def losses(
        self, backbone: PlainViT, inputs: Tensor, labels: Tensor, loss: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """The terms of a step.

        Args:
            inputs: B 3 H W.
            labels: not used.
            loss: from logits, B x classes, to the loss of the labels.

        Returns:
            `loss_cls`, `loss_budget` and, with a teacher, `loss_distill` and, for LV-ViT, `loss_patches`; their sum is
            the loss. Also `cost`, the mean cost as a share of the full cost, and `kept0`, ...: the share of the patches
            that each stage keeps.
        """
        state: Any  # that of a reducer, which has `keep`
        x, state = backbone.begin(inputs, maps=backbone.head.of_positions)
        tokens = []
        for block in backbone.blocks:
            x = backbone.run_unit(block, x, state)
            tokens.append(x.shape[1] if state.keep is None else state.keep.sum(1))
        patches = state.grid[0] * state.grid[1]
        full = cost(backbone, state.grid, [patches] * len(tokens))
        mean = torch.as_tensor(cost(backbone, state.grid, tokens)).mean()
        logits, of_patches = backbone.head.separate(backbone.to_features(x, state))
        found = dict(loss_cls=loss(logits), loss_budget=self.weight * (mean - self.budget * full).abs())
        if self.distillation:
            # It is not a submodule, so nothing else moves it to the images' device.
            teacher = self.teacher.to(inputs.device)
            with torch.no_grad():
                wanted, of_teacher = teacher.head.separate(teacher.forward_features(inputs))
            found["loss_distill"] = self.distillation * divergence(logits, wanted).mean()
            if of_patches is not None:
                kept = torch.ones_like(x[:, 1:, 0]) if state.keep is None else state.keep[:, 1:].detach().round()
                apart = divergence(of_patches, of_teacher) * kept
                found["loss_patches"] = self.distillation * apart.sum() / kept.sum().clamp(min=1)
        found["cost"] = mean.detach() / full
        for i, stage in enumerate(backbone.reducer.blocks):
            found[f"kept{i}"] = ((torch.as_tensor(tokens[stage]).detach() - state.prefix) / patches).mean()
        return found
