"""How far a student is from its teacher. All comparisons are relative, so that layers weigh alike, and in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = 1e-6


def matrix_errors(found: Tensor, wanted: Tensor) -> Tensor:
    """Distances of matrices (B, heads, N, N), Frobenius norms relative to the wanted matrix: (B, heads)."""
    found, wanted = _wide(found), _wide(wanted)
    return _norms((found - wanted).flatten(2)) / _norms(wanted.flatten(2))


def token_errors(found: Tensor, wanted: Tensor) -> Tensor:
    """Distances of tokens (B, N, C), norms over channels relative to the wanted token: (B, N)."""
    found, wanted = _wide(found), _wide(wanted)
    return _norms(found - wanted) / _norms(wanted)


def cosines(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosines of tokens (..., C), each token without its mean: (...)."""
    student, teacher = (F.layer_norm(_wide(x), x.shape[-1:]) for x in (student, teacher))
    return F.cosine_similarity(student, teacher, -1)


def _norms(x: Tensor) -> Tensor:
    """Norms over the last axis, at least TINY; a difference of zero has the gradient zero."""
    return x.square().sum(-1).clamp(min=TINY**2).sqrt()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
