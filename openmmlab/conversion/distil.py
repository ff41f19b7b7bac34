"""The stage that trains the whole student on the whole teacher."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from terrazzo.backbones._checks import number, wholes
from terrazzo.backbones._divergence import divergence, judged
from terrazzo.backbones._states import run
from terrazzo.errors import InputError
from terrazzo.openmmlab.conversion.adapters import adapter_parameters, add_adapters, merged
from terrazzo.openmmlab.conversion.losses import cosines
from terrazzo.openmmlab.conversion.stages import Stage

if TYPE_CHECKING:
    from terrazzo.openmmlab.conversion.model import AttentionConversion

PARTS = ("all", "attention", "adapters")
TAPS = 4  # how many blocks are compared if none are named


class DistilStage(Stage):
    """Trains the student on its own tokens: KL(teacher, student) of logits, cosines of tokens, and labels if given.

    loss = KL + token_weight * sum over taps of (1 - mean cosine) + task_weight * cross-entropy

    Without a head, KL is that of the final tokens, normalised without weights, softmax over channels, as a mean over
    tokens. The cosines
    are those of tokens behind the tapped blocks after a LayerNorm without weights.

    Source: MOHAWK, arXiv 2408.10189, weight transfer and knowledge distillation; cosines and weights are ours.

    Args:
        taps: The blocks whose tokens are compared; None for four blocks, evenly spaced, with the last among them.
        token_weight: The weight of a tapped block.
        task_weight: The weight of the labels' loss, where images have labels and the model has a head.
        trained: "all"; "attention" for the converted attention layers alone; or "adapters" for these and low-rank
            adapters (LoRA) around the linear layers of everything else. Adapters need the extra `conversion`, and
            `StudentHook` writes the student with the adapters added to its weights.
        rank, alpha: Of adapters: an adapter adds alpha / rank * B A to a weight, where A and B have the rank.
    """

    def __init__(
        self,
        taps: Sequence[int] | None = None,
        token_weight: float = 0.5,
        task_weight: float = 0.1,
        trained: str = "all",
        rank: int = 16,
        alpha: float = 32.0,
    ):
        if trained not in PARTS:
            raise InputError(f"trained must be one of {', '.join(PARTS)}, got {trained!r}")
        self.taps = None if taps is None else wholes("taps", taps)
        self.token_weight, self.task_weight = number("token_weight", token_weight), number("task_weight", task_weight)
        self.part, self.rank, self.alpha = trained, rank, alpha

    def prepare(self, model: "AttentionConversion") -> None:
        depth = len(model.backbone.blocks)
        if self.taps is None:
            count = min(TAPS, depth)
            self.taps = tuple((i + 1) * depth // count - 1 for i in range(count))
        if not all(0 <= tap < depth for tap in self.taps):
            raise InputError(f"taps must be blocks from 0 to {depth - 1}, got {self.taps}")
        if self.part == "adapters":
            add_adapters(model.backbone, model.layers, self.rank, self.alpha)

    def trained(self, model: "AttentionConversion") -> Iterator[nn.Parameter]:
        if self.part == "all":
            yield from model.backbone.parameters()
        else:
            for layer in model.layers:
                yield from model.backbone.blocks[layer].attn.parameters()
        if self.part == "adapters":
            yield from adapter_parameters(model.backbone)

    def finished(self, model: "AttentionConversion") -> nn.Module | None:
        return merged(model.backbone) if self.part == "adapters" else None

    def losses(
        self, model: "AttentionConversion", images: Tensor, labels: Tensor | None, progress: float
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            wanted, wanted_tokens = passed(model.teacher, images, self.taps)
        found, tokens = passed(model.backbone, images, self.taps)
        cosine = torch.stack([cosines(own, other).mean() for own, other in zip(tokens, wanted_tokens)])
        losses = {"loss_kl": divergence(found, wanted).mean()}
        if self.taps:
            losses["loss_tokens"] = self.token_weight * (1 - cosine).sum()
        if labels is not None and found.dim() == 2 and self.task_weight:
            losses["loss_task"] = self.task_weight * F.cross_entropy(found.float(), labels)
        return losses | {f"cosine{tap}": value.detach() for tap, value in zip(self.taps, cosine)}


def passed(model: Any, images: Tensor, taps: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """What a divergence compares of a host's output, and the tokens (B, N, C) behind some blocks."""
    x, state = model._begin(images, maps=model.global_pool not in ("token", ""))
    tokens = {}
    for layer, block in enumerate(model.blocks):
        x = run(block, x, state, model.grad_checkpointing)
        if layer in taps:
            tokens[layer] = x
    x = model._features(x, state)
    return judged(model, x), [tokens[tap] for tap in taps]
