"""Focal losses (Lin et al., 2017, equation 5) over logits, and over softmax probabilities."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fills `output` with -alpha (1 - p)^gamma log p at the target class and -(1 - alpha) p^gamma log(1 - p) elsewhere.

    Args:
        input: N x C logits, p their sigmoid.
        target: N class indices; any index outside 0..C-1 means background.
        weight: C weights of the target class, or empty; background has weight 1.
        output: N x C, filled in place.
        gamma: the focusing exponent.
        alpha: the balance between the target class and the others.
    """
    logits = _single(input)
    p = logits.sigmoid()
    positive = -alpha * (1 - p) ** gamma * F.logsigmoid(logits)
    negative = -(1 - alpha) * p**gamma * F.logsigmoid(-logits)
    loss = torch.where(_one_hot(target, input), positive, negative)
    output.copy_(loss * _row_weight(target, weight, logits)[:, None])


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fills `grad_input` (N x C) with the derivative of each loss by its logit; arguments as in the forward."""
    logits = _single(input)
    p = logits.sigmoid()
    positive = -alpha * (1 - p) ** gamma * (1 - p - gamma * p * F.logsigmoid(logits))
    negative = -(1 - alpha) * p**gamma * (gamma * (1 - p) * F.logsigmoid(-logits) - p)
    slope = torch.where(_one_hot(target, input), positive, negative)
    grad_input.copy_(slope * _row_weight(target, weight, logits)[:, None])


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fills `output` (N) with -alpha (1 - p)^gamma log p of the target class; 0 where the target is outside 0..C-1.

    Args:
        input: N x C softmax probabilities.
        target: N class indices.
        weight: C weights of the target class, or empty.
        output: N, filled in place.
        gamma: the focusing exponent.
        alpha: a factor on all losses.
    """
    p, known = _target_probability(input, target)
    loss = -alpha * (1 - p) ** gamma * p.log()
    output.copy_(torch.where(known, loss * _row_weight(target, weight, p), 0))


def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fills `grad_input` (N x C) with the derivative of each row's loss by the logits, `buff` (N) with its row factor.

    Arguments as in the forward.
    """
    p, known = _target_probability(input, target)
    factor = alpha * (gamma * (1 - p) ** (gamma - 1) * p * p.log() - (1 - p) ** gamma)
    buff.copy_(torch.where(known, factor * _row_weight(target, weight, p), 0))
    grad_input.copy_(_single(buff)[:, None] * (_one_hot(target, input).to(p.dtype) - _single(input)))


def _single(tensor: Tensor) -> Tensor:
    """In single precision at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _one_hot(target: Tensor, input: Tensor) -> Tensor:
    """Whether a column is the row's target class: N x C, all false for background."""
    return target[:, None] == torch.arange(input.shape[1], device=input.device)


def _row_weight(target: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """The weight of each row's target class; 1 for background, or where there are no weights."""
    if weight.numel() == 0:
        return like.new_ones(len(target))
    known = (target >= 0) & (target < len(weight))
    return torch.where(known, weight[target.clamp(0, len(weight) - 1)].to(like.dtype), 1)


def _target_probability(softmax: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The probability of each row's target class, above zero for the logarithm, and whether the class exists."""
    softmax = _single(softmax)
    known = (target >= 0) & (target < softmax.shape[1])
    p = softmax.gather(1, target.clamp(0, softmax.shape[1] - 1)[:, None])[:, 0]
    return p.clamp(min=torch.finfo(softmax.dtype).tiny), known
