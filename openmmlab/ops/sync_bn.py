"""The local parts of batch normalisation over processes (Ioffe and Szegedy, 2015); mmcv reduces between them."""

from torch import Tensor


def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """Fills `mean` (C, float32) with the mean of the input (B C L)."""
    mean.copy_(input.float().mean((0, 2)))


def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """Fills `var` (C, float32) with the mean square distance of the input (B C L) from a given mean (C)."""
    var.copy_((input.float() - mean[:, None]).square().mean((0, 2)))


def sync_bn_forward_output(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm: Tensor,
    std: Tensor,
    output: Tensor,
    eps: float,
    momentum: float | Tensor,
    group_size: int,
) -> None:
    """Fills `norm`, `std` and `output`, and moves the running statistics.

    Args:
        input: B C L.
        mean: C, over all processes.
        var: C, over all processes.
        weight: C.
        bias: C.
        running_mean: C, or None if no statistics are kept.
        running_var: C, likewise; it moves to the unbiased variance.
        norm: B C L, float32; the normalised input.
        std: C, float32.
        output: B C L; the normalised input, times weight, plus bias.
        eps: added to the variance.
        momentum: weight of the new statistics.
        group_size: number of processes; each is assumed to hold as many elements as this process.
    """
    std.copy_((var + eps).sqrt())
    norm.copy_((input.float() - mean[:, None]) / std[:, None])
    output.copy_(norm * weight[:, None] + bias[:, None])
    if running_mean is not None:
        count = input.shape[0] * input.shape[2] * group_size
        unbiased = var * (count / max(count - 1, 1))
        running_mean.copy_(momentum * mean + (1 - momentum) * running_mean)
        running_var.copy_(momentum * unbiased + (1 - momentum) * running_var)


def sync_bn_backward_param(grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """Fills the gradients by weight and bias (C), given the output's gradient and the normalised input (B C L)."""
    grad_weight.copy_((grad_output.float() * norm).sum((0, 2)))
    grad_bias.copy_(grad_output.float().sum((0, 2)))


def sync_bn_backward_data(
    grad_output: Tensor,
    weight: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    norm: Tensor,
    std: Tensor,
    grad_input: Tensor,
) -> None:
    """Fills `grad_input` (B C L), given the gradients by weight and bias averaged over the processes."""
    count = grad_input.shape[0] * grad_input.shape[2]
    through_statistics = (grad_weight[:, None] * norm + grad_bias[:, None]) / count
    grad_input.copy_((weight / std)[:, None] * (grad_output.float() - through_statistics))
