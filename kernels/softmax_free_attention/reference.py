"""Softmax-free attention by its definition: Gaussian kernels, Newton's iteration, three products. It is authoritative.

Sources: SOFT, arXiv 2110.11945, section 3; SOFT++, arXiv 2207.03341, section 3. The start and the steps of the
iteration are the official code's, because they define the result where the iteration does not converge.
"""

import torch

from terrazzo.kernels.dispatch.dtypes import accumulator

STEPS = 20  # of Newton's iteration
DIAGONAL = 0.01  # added to the diagonal of SOFT's matrix
HALVINGS = 10  # of SOFT++'s start, at most
WORST = 1.01  # the largest column sum of |I - A V| at SOFT++'s start


def softmax_free_attention(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
    landmark: torch.Tensor,
    normalised: bool,
    alpha_scope: str,
    implicit: bool,
) -> torch.Tensor:
    """G(query, landmark) M (G(key, landmark)^T value), with M nearly the inverse of G(landmark, landmark).

    Args:
        query, key, value: (B, heads, N, D); a missing key is the query.
        landmark: (B, heads, m, D).
        normalised, alpha_scope, implicit: see `terrazzo.kernels.softmax_free_attention`.

    Returns:
        (B, heads, N, D). Memory: B * heads * N * m weights, and the matrices of all steps.
    """
    dtype = accumulator(query, value, landmark)
    query, wide, landmark = query.to(dtype), value.to(dtype), landmark.to(dtype)
    read = gaussian(query, landmark)
    write = read if key is None else gaussian(key.to(dtype), landmark)
    matrix = gaussian(landmark, landmark)
    middle = normalised_inverse(matrix, alpha_scope, implicit) if normalised else regular_inverse(matrix)
    return (read @ (middle @ (write.transpose(2, 3) @ wide))).to(value.dtype)


def gaussian(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """exp(-|x_i - y_j|^2 / 2), (B, heads, N, m). Squared distances that rounding makes negative are 0."""
    squares = x.square().sum(3, keepdim=True) + y.square().sum(3).unsqueeze(2) - 2 * x @ y.transpose(2, 3)
    return torch.exp(-squares.clamp(min=0) / 2)


def regular_inverse(matrix: torch.Tensor) -> torch.Tensor:
    """SOFT's inverse of kernel matrices (B, heads, m, m), with 0.01 on the diagonal, and the gradient of an inverse.

    Eigenvalues of I - alpha P^2 stay between -0.84 and 1, so the iteration cannot diverge.
    """
    alpha = 1.8 / matrix.detach().sum(3, keepdim=True).amax(2, keepdim=True).square()
    return _Inverse.apply(matrix + DIAGONAL * _eye(matrix), alpha)


def normalised_inverse(matrix: torch.Tensor, alpha_scope: str, implicit: bool = False) -> torch.Tensor:
    """SOFT++'s inverse of kernel matrices (B, heads, m, m), scaled by the roots of their row sums on both sides."""
    over = (0, 1, 2, 3) if alpha_scope == "global" else (2, 3)
    rows, eye = matrix.sum(3, keepdim=True), _eye(matrix)
    square = matrix @ matrix
    alpha = 2 / rows.amax(over, keepdim=True).square()
    for _ in range(HALVINGS):  # halve until the start is good enough
        worst = (eye - alpha * square).detach().abs().sum(2, keepdim=True).amax(over, keepdim=True)
        alpha = torch.where(worst > WORST, alpha / 2, alpha)
    inverse = _Inverse.apply(matrix, alpha.detach()) if implicit else _iterated(matrix, alpha)
    scale = rows.rsqrt()
    return scale * inverse * scale.transpose(2, 3)


def _eye(matrix: torch.Tensor) -> torch.Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def _iterated(matrix: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Newton's iteration towards the inverse, from alpha times the matrix."""
    inverse = alpha * matrix
    for _ in range(STEPS):
        inverse = 2 * inverse - inverse @ matrix @ inverse
    return inverse


class _Inverse(torch.autograd.Function):
    """Newton's iteration with the derivative of the inverse; alpha has none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix, alpha):
        return _iterated(matrix, alpha)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        turned = inverse.transpose(-2, -1)
        return -(turned @ grad @ turned), None

    @staticmethod
    def jvp(ctx, tangent, _):
        (inverse,) = ctx.saved_tensors
        return -(inverse @ tangent @ inverse)
