"""Softmax-free attention in standard operations: pieces of weights that stay in the caches, forward and backward.

The functions run inside the op, on real tensors.
"""

from collections.abc import Iterator

import torch

from terrazzo.kernels.softmax_free_attention import middle

# Weights computed at a time: on a CPU as many as the caches hold, elsewhere few enough for any memory.
_PIECE = 1 << 18
_PIECE_ELSEWHERE = 1 << 25

newton, newton_backward = middle.newton, middle.newton_backward


def empty_tokens(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An empty (B, heads, N, D) whose tokens hold their heads together, so that merging heads needs no copy."""
    batch, heads, tokens, dim = like.shape
    return like.new_empty((batch, tokens, heads, dim), dtype=dtype).transpose(1, 2)


def _pieces(token: torch.Tensor, landmark: torch.Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of images (for landmarks: all tokens of several images, or some tokens of an image)."""
    batch, heads, tokens, _ = token.shape
    size = _PIECE if token.device.type == "cpu" else _PIECE_ELSEWHERE
    each = heads * landmark.shape[2]
    rows = max(1, min(tokens, size // each))
    images = max(1, min(batch, size // (rows * each))) if rows == tokens else 1
    for image in range(0, batch, images):
        for row in range(0, tokens, rows):
            yield (slice(image, min(image + images, batch)), slice(None), slice(row, min(row + rows, tokens)))


def _extended(x: torch.Tensor, own: int) -> torch.Tensor:
    """Vectors with two more elements, so that the product of a token and a landmark is -|x - y|^2 / 2.

    own: the place of -|x|^2 / 2 among the two; the other is 1.
    """
    half = x.square().sum(3, keepdim=True) / -2
    more = [half, torch.ones_like(half)]
    return torch.cat([x, *(more if own == 0 else reversed(more))], 3)


def _weights(token: torch.Tensor, extended: torch.Tensor) -> torch.Tensor:
    """Gaussian kernels of some tokens and of landmarks from `_extended`."""
    return (_extended(token, 0) @ extended.transpose(2, 3)).clamp_(max=0).exp_()


def write(token: torch.Tensor, landmark: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Sums of values for each landmark, (B, heads, m, D), in the dtype of the landmarks."""
    sums, extended = torch.zeros_like(landmark), _extended(landmark, 1)
    for piece in _pieces(token, landmark):
        image, dtype = piece[0], landmark.dtype
        weight = _weights(token[piece].to(dtype), extended[image])
        sums[image] += weight.transpose(2, 3) @ value[piece].to(dtype)
    return sums


def read(token: torch.Tensor, landmark: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sums of the landmarks' rows (B, heads, m, D) for each token."""
    out, extended = empty_tokens(token, dtype), _extended(landmark, 1)
    for piece in _pieces(token, landmark):
        image = piece[0]
        out[piece] = _weights(token[piece].to(landmark.dtype), extended[image]) @ rows[image]
    return out


def gradients(
    token: torch.Tensor, values: torch.Tensor, landmark: torch.Tensor, rows: torch.Tensor, to_tokens: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of sum_ij w_ij <values_i, rows_j> by token i and landmark j, with w their Gaussian kernel.

    Returns:
        The tokens' gradient, the landmarks' gradient, and the gradient by values (`to_tokens`) or by rows.
    """
    dtype, extended = landmark.dtype, _extended(landmark, 1)
    grad_token, grad_landmark = empty_tokens(token, dtype), torch.zeros_like(landmark)
    sums = empty_tokens(token, dtype) if to_tokens else torch.zeros_like(landmark)
    totals = landmark.new_zeros(*landmark.shape[:3], 1)
    for piece in _pieces(token, landmark):
        image, own, value = piece[0], token[piece].to(dtype), values[piece].to(dtype)
        weight = _weights(own, extended[image])
        if to_tokens:
            sums[piece] = weight @ rows[image]
        else:
            sums[image] += weight.transpose(2, 3) @ value
        weight *= value @ rows[image].transpose(2, 3)
        grad_token[piece] = weight @ landmark[image] - weight.sum(3, keepdim=True) * own
        grad_landmark[image] += weight.transpose(2, 3) @ own
        totals[image] += weight.sum(2).unsqueeze(3)
    return grad_token, grad_landmark - totals * landmark, sums
