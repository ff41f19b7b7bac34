"""The whole operator, forward and backward, of a form's parts: reading, writing, their gradients, Newton's steps."""

from types import ModuleType

import torch

from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.kernels.softmax_free_attention import middle


def _wide(landmark: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return landmark.to(accumulator(landmark, *others)).contiguous()


def forward(
    form: ModuleType,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
    landmark: torch.Tensor,
    normalised: bool,
    alpha_scope: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, and for `backward` the sums of values (B, heads, m, D) and the inverse (B, heads, m, m)."""
    landmark = _wide(landmark, query, value)
    sums = form.write(query if key is None else key, landmark, value)
    begin = middle.start(middle.gaussian(landmark), normalised, alpha_scope)
    inverse = form.newton(begin.matrix, begin.alpha)
    out = form.read(query, landmark, middle.scaled(inverse, begin) @ sums, value.dtype)
    return out, sums, inverse


def backward(
    form: ModuleType,
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
    landmark: torch.Tensor,
    sums: torch.Tensor,
    inverse: torch.Tensor,
    normalised: bool,
    alpha_scope: str,
    implicit: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Gradients by query, key (None without a key), value and landmark."""
    wide = _wide(landmark, query, value)
    matrix = middle.gaussian(wide)
    begin = middle.start(matrix, normalised, alpha_scope)
    between = middle.scaled(inverse, begin)
    grad_query, grad_landmark, grad_rows = form.gradients(query, grad, wide, between @ sums, to_tokens=False)
    grad_matrix = middle.backward(grad_rows @ sums.transpose(2, 3), inverse, begin, implicit, form.newton_backward)
    grad_sums = between.transpose(2, 3) @ grad_rows
    grad_key, by_keys, grad_value = form.gradients(
        query if key is None else key, value, wide, grad_sums, to_tokens=True
    )
    grad_landmark = grad_landmark + by_keys + middle.gaussian_backward(grad_matrix, matrix, wide)
    if key is None:
        grad_query, grad_key = grad_query + grad_key, None
    else:
        grad_key = grad_key.to(key.dtype)
    return grad_query.to(query.dtype), grad_key, grad_value.to(value.dtype), grad_landmark.to(landmark.dtype)
