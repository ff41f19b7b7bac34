"""MCTF's fine-tuning: a network that merges many tokens learns from the same network merging few."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from terrazzo.backbones.mctf import MCTF
from terrazzo.errors import InputError
from terrazzo.openmmlab.seeding import fold

PARTS = 100  # numbers below 1 are drawn on a grid of a hundredth


@MODELS.register_module()
class TokenConsistency:
    """A `recipe` of `Classifier`: token-reduction consistency.

    A step runs the network twice, with gradients both times: as student, which merges the model's r tokens in each
    block, and as teacher, which merges a random r'. Both learn the labels. The student's class token is pulled towards
    the teacher's class token, which is detached in this term:

        loss(student) + loss(teacher) + weight * mean over images and channels of (student - teacher)^2

    The mean is over the images that the student is sure of; it is 0 if there are none.

    Each process draws its own r', as in the authors' code, so the gradient is a mean over several r'. (With a common
    r', processes that merge many tokens would not wait for processes that merge few.) A separate generator draws r'; it
    is seeded again with every new seed of PyTorch's. So stochastic depth and mixup are the same as without this recipe,
    and a resumed run draws the same numbers as an uninterrupted run.

    Source: arXiv 2403.10030, section 3.5; only the authors' code requires that the student is sure.

    Args:
        r_max: r' is 0, 1, ... below it, or, if it is below 1, 0, 0.01, ... below it.
        weight: weight of the third term.
        confidence: the student is sure of an image if it gives its class more than this probability; for a mixed image,
            if the sum of the probabilities of its two classes is more.

    Raises:
        InputError: `r_max` is neither a whole number of at least 1, nor a share of at least 0.01.
    """

    def __init__(self, r_max: float, weight: float = 3.0, confidence: float = 0.4):
        if r_max < 1 / PARTS or (r_max >= 1 and int(r_max) != r_max):
            raise InputError(f"r_max must be a whole number of tokens, or a share from 0.01 to 1, got {r_max}")
        self.r_max = r_max
        self.weight = weight
        self.confidence = confidence
        self.generator = torch.Generator()
        self.seed: int | None = None

    def prepare(self, backbone: nn.Module, **source: Any) -> None:
        """Checks that the model merges tokens.

        Raises:
            InputError: if it does not.
        """
        if not isinstance(backbone, MCTF):
            raise InputError(f"TokenConsistency trains MCTF, and the model is {type(backbone).__name__}; see recipe")

    def draw(self) -> float:
        """The r' of a step."""
        if self.seed != torch.initial_seed():
            self.seed = torch.initial_seed()
            self.generator.manual_seed(fold(self.seed))
        grid = 1 if self.r_max >= 1 else PARTS
        return torch.randint(round(self.r_max * grid), (), generator=self.generator).item() / grid

    def losses(
        self, backbone: nn.Module, inputs: Tensor, labels: Tensor, loss: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """The terms of a step.

        Args:
            inputs: B 3 H W.
            labels: B x K, the classes in each image: one, or two if images are mixed.
            loss: from logits, B x classes, to the loss of the labels.

        Returns:
            `loss_student`, `loss_teacher` and `loss_consistency`; their sum is the loss. Also `sure`, the share of the
            images that the student is sure of.
        """
        student = backbone.forward_features(inputs)
        teacher = backbone.forward_features(inputs, r=self.draw())
        logits = backbone.forward_head(student)
        sure = logits.detach().softmax(-1).gather(1, labels).sum(1) > self.confidence
        error = F.mse_loss(student[:, 0], teacher[:, 0].detach(), reduction="none").mean(1)
        return dict(
            loss_student=loss(logits),
            loss_teacher=loss(backbone.forward_head(teacher)),
            loss_consistency=self.weight * (error * sure).sum() / sure.sum().clamp(min=1),
            sure=sure.float().mean(),
        )
