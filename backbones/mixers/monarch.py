"""Monarch attention: the attention matrix is a product of one factor along rows and one along columns.

Papers: MonarchAttention: Zero-Shot Conversion to Fast, Hardware-Aware Structured Attention, arXiv 2505.18698;
MonarchRT: Efficient Attention for Real-Time Video Generation, arXiv 2602.12271.
"""

import torch
import torch.nn.functional as F

from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._mixer import Host, Mixer
from terrazzo.kernels.dispatch import arguments

# The guard of the factor 1 / c in the authors' code, for more than one step.
_SMALL, _LARGEST = 1e-6, 1e4


class Monarch(Mixer):
    """A query (i, j) weighs the key (k, l) with L[j, i, k] R[k, j, l]: rows k by L, and positions l of a row by R.

    Each R[k, j, :] and each L[j, i, :] is a distribution. They begin at L = 1 and alternate `steps` times, each to the
    maximum of the sum of expected logits and entropies. With s = D^(-1/2) and u = s q at the first step:

        R[k, j] = softmax(u[k, j] k[k, :]), m[k, j] = R[k, j] k[k, :], h[k, j] = entropy of R[k, j]
        L[j, i] = softmax(s q[i, j] m[:, j] + h[:, j])
        u[k, j] = s sum_i L[j, i, k] q[i, j] / sum_i L[j, i, k], for the next step

    On a map of one row or one column, and where keys are equal along each row, this is softmax attention. The cost is
    N (3 W + 2 H) D for a step instead of 2 N^2 D.

    Ours: tokens in front are further entries of L, so their weights are exact, and they attend to all tokens. For
    `steps` > 1 the factor 1 / sum_i L is guarded as in the authors' code, in the first step too.

    Args:
        steps: Number of alternations.

    Source: arXiv 2505.18698, sections 3.1 and 3.2; arXiv 2602.12271 for the form for one frame.
    """

    def __init__(
        self,
        host: Host,
        steps: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(host)
        self.steps = arguments.whole(steps, "steps", 1)

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        front = F.scaled_dot_product_attention(query[:, :, : place.prefix], key, value)
        front_key, front_value = key[:, :, : place.prefix], value[:, :, : place.prefix]
        q, k, v = (x[:, :, place.prefix :].unflatten(2, place.grid) for x in (query, key, value))  # B heads H W D
        scale = q.shape[-1] ** -0.5
        probe = q * scale
        asked = probe.transpose(2, 3)  # B heads W H D
        if self.steps > 1:
            probe = probe * _reciprocal(q.new_ones(()))
        for step in range(self.steps):
            weight, mean, entropy = _along_rows(probe, k)
            if step + 1 < self.steps:
                logits = asked @ mean.permute(0, 1, 3, 4, 2) + entropy.transpose(2, 3).unsqueeze(3)
                others = asked @ front_key.unsqueeze(2).transpose(3, 4)
                left = torch.cat([others, logits], -1).softmax(-1)[..., place.prefix :]  # B heads W H(query) H(row)
                total = left.sum(3)  # B heads W H
                probe = (left.transpose(3, 4) @ asked * _reciprocal(total).unsqueeze(4)).transpose(2, 3)
        columns = (
            q.transpose(2, 3),
            *(
                torch.cat([x.unsqueeze(2).expand(-1, -1, place.grid[1], -1, -1), y.transpose(2, 3)], 3)
                for x, y in ((front_key, mean), (front_value, weight @ v))
            ),
        )
        bias = F.pad(entropy.transpose(2, 3), (place.prefix, 0)).unsqueeze(3).to(query.dtype)  # B heads W 1 H
        q, k, v, bias = (x.flatten(0, 1) for x in (*columns, bias))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).unflatten(0, query.shape[:2])
        return torch.cat([front, out.transpose(2, 3).flatten(2, 3)], 2)


def _along_rows(probe: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights R (..., W, W) of a row's keys (..., W, D), their mean key, and their entropy (..., W)."""
    logits = probe @ key.transpose(-1, -2)
    total = logits.logsumexp(-1, keepdim=True)
    weight = (logits - total).exp().to(key.dtype)
    mean = weight @ key
    return weight, mean, total.squeeze(-1) - (probe * mean).sum(-1)


def _reciprocal(total: torch.Tensor) -> torch.Tensor:
    return (total + _SMALL).reciprocal().clamp(max=_LARGEST)
