"""How far a model's output is from its teacher's: what a plan measures, and what distillation lowers."""

import torch
import torch.nn.functional as F
from torch import nn


def judged(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """What a divergence compares: logits, or features if the model has no classifier.

    Args:
        model: A ViT of timm.
        tokens: (B, N, C), what its `forward_features` returns.

    Returns:
        (B, classes), or (B, N, C): each token normalised over its channels, without weights.
    """
    if model.num_classes > 0:
        return model.forward_head(tokens)
    return F.layer_norm(tokens, tokens.shape[-1:])


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) in nats of the softmax distributions over the last axis: (..., K) to (...).

    It is in float32 at least.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = (x.to(dtype).log_softmax(-1) for x in (student, teacher))
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
