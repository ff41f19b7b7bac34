"""`terrazzo.search_rates`: learn how many tokens each block of a trained ViT can do without."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.backbones._checks import number, wholes
from terrazzo.backbones._hosts import unwrapped
from terrazzo.backbones._rates import Rates
from terrazzo.backbones._reduce import reduce
from terrazzo.backbones._tokens import Reducer
from terrazzo.errors import InputError

WEIGHT = 100.0
"""Of the squared difference to the wanted share; the authors' 5 for differences in G of DeiT-S, which has 4.6 G."""

Batch = torch.Tensor | Sequence[torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def search_rates(
    model: nn.Module,
    batches: Iterable[Batch],
    flops: float,
    blocks: Sequence[int] | None = None,
    lr: float = 0.01,
    loss: Loss | None = None,
) -> dict[str, Any]:
    """Learn DiffRate's schedule for a ViT whose weights stay as they are: options of `terrazzo.reduce`.

    Each batch is one step of AdamW on the counts of dropped and merged patches of each block. With labels the loss is
    cross-entropy; without labels the reduced model imitates the whole model: the divergence of its classes, or for a
    model without classes the cosine of its class token. Any loop may watch: a generator of batches runs between steps.

        rates = terrazzo.search_rates(vit, batches, flops=0.6)
        vit = terrazzo.reduce(vit, method="diffrate", **rates)

    Args:
        model: timm's VisionTransformer or Eva, whose head reads a class token. It does not change.
        batches: Images (B, 3, H, W) of one size, or pairs of images and labels (B,). The paper finds 1000 images
            enough; a search needs some hundred steps.
        flops: The wanted multiply-adds, as a part of those of all blocks, above 0 and up to 1.
        blocks: Blocks that may reduce; None for all but the first, as the authors have it.
        lr: Learning rate of the counts.
        loss: Another loss of the outputs, given the labels, or without labels the outputs of the whole model.

    Returns:
        `blocks` and `keep`: for each block the parts of the image's tokens that are left after dropping and after
        merging. They also hold for other sizes of images.

    Raises:
        InputError: The model has no class token or reads other tokens, there is no batch, images have several sizes,
            or a number is not valid.

    Source: arXiv 2305.17997, section 3. Unlike the official code, sizes of merged tokens are those of "diffrate" at
    inference, and the part of the multiply-adds is of the blocks alone.
    """
    flops, lr = number("flops", flops), number("lr", lr)
    if not 0 < flops <= 1 or lr <= 0:
        raise InputError(f"flops must be above 0 and up to 1, and lr above 0, got {flops} and {lr}")
    plain: Any = unwrapped(model)
    depth = len(getattr(plain, "blocks", ()))
    blocks = tuple(range(1, depth)) if blocks is None else wholes("blocks", blocks)
    shared = {id(value): value for value in (*plain.parameters(), *plain.buffers())}
    vit: Any = reduce(copy.deepcopy(plain, shared), "diffrate", blocks=blocks).eval()
    if vit.global_pool not in ("token", ""):
        raise InputError(
            f"search_rates needs a head that reads the class token, and the model's pools {vit.global_pool!r}"
        )
    rates, optimizer, size = None, None, None
    for batch in batches:
        images, labels = (batch, None) if isinstance(batch, torch.Tensor) else batch
        if size not in (None, images.shape[2:]):
            raise InputError(f"images must have one size, got {tuple(size)} and {tuple(images.shape[2:])}")
        size = images.shape[2:]
        if rates is None or optimizer is None:
            rows, columns = vit.patch_embed.dynamic_feat_size(size)
            rates = Rates(vit.reducer.blocks, rows * columns, images.device)
            optimizer = torch.optim.AdamW(rates.parameters(), lr, weight_decay=0)
        with torch.enable_grad():
            missed = _missed(vit, rates, images, labels, loss)
            total = missed + WEIGHT * (rates.share(vit) - flops) ** 2
            parameters = list(rates.parameters())  # without gradients of the model's weights
            for parameter, gradient in zip(parameters, torch.autograd.grad(total, parameters)):
                parameter.grad = gradient
        optimizer.step()
    if rates is None:
        raise InputError("batches holds no batch: give at least one batch of images (B, 3, H, W)")
    prefix = vit.num_prefix_tokens
    whole = prefix + rates.patches
    keep = tuple(tuple((prefix + left) / whole for left in kept) for kept in rates.kept())
    return dict(blocks=rates.blocks, keep=keep)


def _missed(
    vit: Any, rates: Rates, images: torch.Tensor, labels: torch.Tensor | None, loss: Loss | None
) -> torch.Tensor:
    """The loss of the reduced model."""
    if labels is None:
        vit.reducer = Reducer()
        with torch.no_grad():
            wanted = vit(images)
    else:
        wanted = labels
    vit.reducer = rates
    found = vit(images)
    if loss is not None:
        return loss(found, wanted)
    if labels is not None:
        return F.cross_entropy(found, labels)
    if vit.num_classes:
        return F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)
    return 1 - F.cosine_similarity(found, wanted, dim=-1).mean()
