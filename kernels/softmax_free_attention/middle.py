"""The matrix between reading and writing: where Newton's iteration starts, its steps, and the gradients of all of it.

Everything is in float32 at least. A step may be a matrix product of PyTorch's (here) or a kernel's (`fused`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from terrazzo.kernels.softmax_free_attention.reference import DIAGONAL, HALVINGS, STEPS, WORST


def gaussian(landmark: torch.Tensor) -> torch.Tensor:
    """exp(-|x_i - x_j|^2 / 2) of landmarks (B, heads, m, D) to each other."""
    halves = landmark.square().sum(3, keepdim=True) / 2
    return torch.exp((landmark @ landmark.transpose(2, 3) - halves - halves.transpose(2, 3)).clamp(max=0))


def gaussian_backward(grad: torch.Tensor, matrix: torch.Tensor, landmark: torch.Tensor) -> torch.Tensor:
    """The landmarks' gradient, from their matrix's. A landmark is in a row and in a column."""
    grad = grad * matrix
    grad = grad + grad.transpose(2, 3)
    return grad @ landmark - grad.sum(3, keepdim=True) * landmark


@dataclass(frozen=True)
class Start:
    """Newton's iteration begins at alpha times the matrix.

    Attributes:
        matrix: the matrix to be inverted, (B, heads, m, m).
        alpha: a number for each matrix, or one for all; broadcasts with the matrix.
        rows: the row sums of SOFT++'s matrix, (B, heads, m, 1); None for SOFT.
        largest: the largest row sum, in the shape of alpha.
    """

    matrix: torch.Tensor
    alpha: torch.Tensor
    rows: torch.Tensor | None
    largest: torch.Tensor


def start(matrix: torch.Tensor, normalised: bool, alpha_scope: str) -> Start:
    """Where the iteration begins, from a matrix of Gaussian kernels.

    SOFT++ halves its alpha until no column of I - alpha A^2 has an absolute sum of more than 1.01. The matrix has no
    negative elements, so these sums follow from the diagonal and the column sums of its square, and the square itself
    is not needed. A sum is convex in alpha and is 1 at alpha = 0: the halvings that are too few are the first ones, and
    counting them replaces the official code's loop, which waits for the device at each turn.
    """
    rows = matrix.sum(3, keepdim=True)
    if not normalised:
        largest = rows.amax(2, keepdim=True)
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        return Start(matrix + DIAGONAL * eye, 1.8 / largest.square(), None, largest)
    over = (0, 1, 2, 3) if alpha_scope == "global" else (2, 3)
    largest = rows.amax(over, keepdim=True)
    alpha = 2 / largest.square()
    diagonal = matrix.square().sum(3, keepdim=True)
    others = matrix @ rows - diagonal
    halved = alpha * 0.5 ** torch.arange(HALVINGS, dtype=matrix.dtype, device=matrix.device)  # B heads 1 10
    sums = (1 - halved * diagonal).abs() + halved * others  # B heads m 10
    too_few = (sums.amax(over[:-1], keepdim=True) > WORST).sum(3, keepdim=True)
    return Start(matrix, alpha * torch.pow(0.5, too_few.to(matrix.dtype)), rows, largest)


def newton(matrix: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """The iteration's result, from alpha times the matrix."""
    inverse, flat = (alpha * matrix).flatten(0, 1), matrix.flatten(0, 1)
    for _ in range(STEPS):
        inverse = torch.baddbmm(inverse, torch.bmm(inverse, flat), inverse, beta=2, alpha=-1)
    return inverse.unflatten(0, (-1, matrix.shape[1]))


def newton_backward(grad: torch.Tensor, matrix: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients through all steps, by the matrix and by the iteration's start, for `newton`. The steps run again."""
    path, flat, grad = [(alpha * matrix).flatten(0, 1)], matrix.flatten(0, 1), grad.flatten(0, 1)
    for _ in range(STEPS - 1):
        path.append(torch.baddbmm(path[-1], torch.bmm(path[-1], flat), path[-1], beta=2, alpha=-1))
    grad_matrix, turned = torch.zeros_like(flat), flat.transpose(1, 2)
    for inverse in reversed(path):
        inverse = inverse.transpose(1, 2)
        left = torch.bmm(inverse, grad)
        grad_matrix.baddbmm_(left, inverse, alpha=-1)
        lost = torch.bmm(turned, left).baddbmm_(torch.bmm(grad, inverse), turned)
        grad = 2 * grad - lost
    return grad_matrix.view(matrix.shape), grad.view(matrix.shape)


def scaled(inverse: torch.Tensor, begin: Start) -> torch.Tensor:
    """The matrix between reading and writing: SOFT++ scales the inverse by roots of row sums on both sides."""
    if begin.rows is None:
        return inverse
    scale = begin.rows.rsqrt()
    return scale * inverse * scale.transpose(2, 3)


def backward(grad: torch.Tensor, inverse: torch.Tensor, begin: Start, implicit: bool, steps: Callable) -> torch.Tensor:
    """The gradient by the matrix of Gaussian kernels, from the gradient by the result of `scaled`.

    Args:
        inverse: the result of the iteration.
        implicit: whether the derivative is that of an inverse: dA = -V^T dV V^T. SOFT's always is.
        steps: `newton_backward` or another form of it.
    """
    turned = inverse.transpose(2, 3)
    if begin.rows is None:
        return -(turned @ grad @ turned)
    scale = begin.rows.rsqrt()
    both = grad * inverse
    grad_scale = both @ scale + both.transpose(2, 3) @ scale
    grad_rows = -0.5 * grad_scale * scale / begin.rows
    grad = scale * grad * scale.transpose(2, 3)
    if implicit:
        return grad_rows - turned @ grad @ turned
    grad_matrix, grad_start = steps(grad, begin.matrix, begin.alpha)
    by_alpha = (grad_start * begin.matrix).sum_to_size(begin.alpha.shape)
    at_largest = begin.rows == begin.largest
    count = at_largest.sum_to_size(begin.alpha.shape)
    grad_rows = grad_rows - torch.where(at_largest, 2 * begin.alpha / begin.largest * by_alpha / count, 0)
    return grad_matrix + begin.alpha * grad_start + grad_rows
