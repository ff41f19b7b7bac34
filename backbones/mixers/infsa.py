"""Pure InfSA: attention by the positive part of the products, divided by the norm of the whole matrix.

Paper: Self-Attention And Beyond the Infinite: Towards Linear Transformers with Infinite Self-Attention, 2026, arXiv
2603.00175. Official code: github.com/giorgioroffo/infinite-self-attention (MIT).
"""

import torch

from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._infsa import EPS, InfiniteAttention
from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast
from terrazzo.kernels.dispatch.exporting import is_exporting

SCORES = 2**24  # the most scores in memory at once; if the queries need more, they are taken in pieces


class InfSA(InfiniteAttention):
    """out = rho R v / (||R||_F + 1e-6), R = relu(q k^T / D), with one norm for each image and head.

    Rows of the matrix have different sums, and all N^2 entries have the norm rho, so that outputs become smaller as N
    grows. If all products are negative, the result is 0. The order of tokens does not matter. A merged token counts as
    often as the patches that it stands for, as a query (in the norm) and as a key.

    The cost is quadratic in N, and the memory is linear: R v and ||R||^2 come from one pass over pieces of the queries,
    and the backward pass computes R again. All sums are in float32 at least. Against the official code, rho is
    trained.

    Source: arXiv 2603.00175, Pure InfSA.
    """

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        dtype = accumulator(query, key, value)
        with without_autocast(value):
            given = [query.to(dtype), key.to(dtype), value.to(dtype)]
            if place.size is None:
                out = self.rho(dtype) * normalised(*given)
            else:
                # Twice the same token is once the token, times sqrt(2), on both sides of R.
                root = place.size[:, None, :, None].to(dtype).sqrt()
                out = self.rho(dtype) * normalised(*(x * root for x in given))
                out = out / torch.where(root > 0, root, 1)  # padding has size 0, and its result is 0
        return out.to(value.dtype)


def normalised(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """R v / (||R||_F + 1e-6) (B, heads, N, D), with R = relu(q k^T / D)."""
    out, energy = positive(query / query.shape[-1], key, value)
    alive = energy > 0
    norm = torch.where(alive, torch.where(alive, energy, 1).sqrt(), 0)  # no gradient of the root of 0
    return out / (norm + EPS)


def positive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """R v (B, heads, N, D) and the sum of the squares of R (B, heads, 1, 1), with R = relu(q k^T)."""
    if is_exporting():
        return _piece(query, key, value)
    return _Positive.apply(query, key, value)


def _piece(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = (query @ key.transpose(2, 3)).relu()
    return scores @ value, scores.square().sum((2, 3), keepdim=True)


def _rows(query: torch.Tensor, key: torch.Tensor) -> int:
    """The number of queries in a piece."""
    return max(1, SCORES // max(1, query.shape[0] * query.shape[1] * key.shape[2]))


class _Positive(torch.autograd.Function):
    """`positive` in pieces; the backward pass computes the scores again."""

    @staticmethod
    def forward(query, key, value):
        parts, energies = zip(*(_piece(part, key, value) for part in query.split(_rows(query, key), 2)))
        return torch.cat(parts, 2), sum(energies[1:], energies[0])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad, grad_energy):
        query, key, value = ctx.saved_tensors
        rows = _rows(query, key)
        grad_query, grad_key, grad_value = [], torch.zeros_like(key), torch.zeros_like(value)
        for part, above in zip(query.split(rows, 2), grad.split(rows, 2)):
            scores = (part @ key.transpose(2, 3)).relu()
            inner = torch.where(scores > 0, above @ value.transpose(2, 3) + 2 * grad_energy * scores, 0)
            grad_value = grad_value + scores.transpose(2, 3) @ above
            grad_query.append(inner @ key)
            grad_key = grad_key + inner.transpose(2, 3) @ part
        return torch.cat(grad_query, 2), grad_key, grad_value
