"""`terrazzo.search_rates`: learn how many tokens each block of a trained ViT can do without."""

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.backbones._checks import number, wholes
from terrazzo.backbones._convert import check_together
from terrazzo.backbones._hosts import unwrapped
from terrazzo.backbones._rates import Rates
from terrazzo.backbones._reduce import reduce
from terrazzo.backbones._tokens import Reducer
from terrazzo.errors import InputError, NonFiniteError, first_line

WEIGHT = 100.0
"""Of the squared difference to the wanted share; the authors' 5 for differences in G of DeiT-S, which has 4.6 G."""

NEAR = 0.02
"""A search that ends farther from the wanted share says so."""

Batch = torch.Tensor | Sequence[torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def search_rates(
    model: nn.Module,
    batches: torch.Tensor | Iterable[Batch],
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
        model: timm's VisionTransformer or Eva, whose head reads a class token. It does not change. Blocks in front of
            the first reducing block may have mixers.
        batches: Images (B, 3, H, W) of one size, or pairs of images and labels (B,). The paper finds 1000 images
            enough. With the authors' `lr` a search needs more than 500 steps, so go over your images several times.
        flops: The wanted multiply-adds, as a part of the whole model's blocks, above 0 and up to 1.
        blocks: Blocks that may reduce; None for all but the first, as the authors have it.
        lr: Learning rate of the counts.
        loss: Another loss of the outputs, given the labels, or without labels the outputs of the whole model.

    Returns:
        `blocks` and `keep`: for each block the parts of the image's tokens that are left after dropping and after
        merging. They also hold for other sizes of images.

    Raises:
        InputError: The model has no class token or reads other tokens, a reducing block has a mixer, a batch is not
            valid, images have several sizes, or `flops` cannot be reached, or a number is not valid.
        NonFiniteError: The loss is NaN or infinite.

    Source: arXiv 2305.17997, section 3. Unlike the official code, merged tokens have the sizes that "diffrate" gives at
    inference, and the part of the multiply-adds is of the blocks alone.
    """
    flops, lr = number("flops", flops), number("lr", lr)
    if not 0 < flops <= 1 or lr <= 0:
        raise InputError(f"flops must be above 0 and up to 1, and lr above 0, got {flops} and {lr}")
    if torch.is_inference_mode_enabled():
        raise InputError("search_rates learns counts: call it outside of torch.inference_mode()")
    vit = _reducing(model, blocks)
    like = next(vit.parameters())
    rates, optimizer, size = None, None, None
    for step, batch in enumerate([batches] if isinstance(batches, torch.Tensor) else batches):
        images, labels = _taken(batch, like)
        if labels is not None and loss is None and not vit.num_classes:
            raise InputError("the model has no classes, so labels need a loss: give images alone, or loss=")
        if size not in (None, images.shape[2:]):
            raise InputError(f"images must have one size, got {tuple(size)} and {tuple(images.shape[2:])}")
        size = images.shape[2:]
        if rates is None or optimizer is None:
            rates = _rates(vit, size, flops, like.device)
            optimizer = torch.optim.AdamW(rates.parameters(), lr, weight_decay=0)
        with torch.enable_grad():
            total = _missed(vit, rates, images, labels, loss) + WEIGHT * (rates.share(vit) - flops) ** 2
            if not total.isfinite():
                raise NonFiniteError(f"the loss of the search is {total.item()} at step {step}")
            parameters = list(rates.parameters())  # without gradients of the model's weights
            for parameter, gradient in zip(parameters, torch.autograd.grad(total, parameters)):
                parameter.grad = gradient
        optimizer.step()
    if rates is None:
        raise InputError("batches holds no batch: give at least one batch of images (B, 3, H, W)")
    reached = rates.share(vit).item()
    if abs(reached - flops) > NEAR:
        message = (
            f"the search ended at {reached:.2f} of the multiply-adds, and {flops:.2f} was asked for: give more "
            "batches, or a larger lr"
        )
        warnings.warn(message, stacklevel=2)
    whole = vit.num_prefix_tokens + rates.patches
    keep = tuple(tuple((vit.num_prefix_tokens + left) / whole for left in kept) for kept in rates.kept())
    return dict(blocks=rates.blocks, keep=keep)


def _reducing(model: nn.Module, blocks: Sequence[int] | None) -> Any:
    """A copy of the model that reduces by "diffrate" in these blocks; it has the model's own weights."""
    plain: Any = unwrapped(model)
    depth = len(getattr(plain, "blocks", ()))
    places = tuple(range(1, depth)) if blocks is None else tuple(sorted(set(wholes("blocks", blocks))))
    shared = {id(value): value for value in (*plain.parameters(), *plain.buffers())}
    vit: Any = reduce(copy.deepcopy(plain, shared), "diffrate", blocks=places).eval()
    if not places:
        raise InputError("blocks names no block that may reduce")
    if vit.global_pool not in ("token", ""):
        raise InputError(
            f"search_rates needs a head that reads the class token, and the model's pools {vit.global_pool!r}"
        )
    return vit


def _taken(batch: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images and labels of a batch, on the model's device and images in its dtype.

    Raises:
        InputError: The batch is something else.
    """
    parts: Any = (batch,) if isinstance(batch, torch.Tensor) else batch
    valid = isinstance(parts, Sequence) and len(parts) in (1, 2) and all(isinstance(x, torch.Tensor) for x in parts)
    if not valid or parts[0].dim() != 4:
        raise InputError(
            "a batch must be images (B, 3, H, W), or a pair of images and labels (B,), got "
            + (f"a tensor {tuple(batch.shape)}" if isinstance(batch, torch.Tensor) else f"a {type(batch).__name__}")
        )
    return parts[0].to(like.device, like.dtype), parts[1].to(like.device) if len(parts) == 2 else None


def _rates(vit: Any, size: torch.Size, flops: float, device: torch.device) -> Rates:
    """Counts for images of a size (H, W).

    Raises:
        InputError: The model does not take the size, a block that Rates computes has a mixer, or the wanted part of
            the multiply-adds is less than that of one patch for each block.
    """
    rows, columns = vit.patch_embed.dynamic_feat_size(size)
    rates = Rates(vit.reducer.blocks, rows * columns, device)
    check_together(vit, rates)
    least = rates.least_share(vit)
    if flops < least:
        raise InputError(f"these blocks leave at least {least:.2f} of the multiply-adds, and flops is {flops}")
    return rates


def _missed(
    vit: Any, rates: Rates, images: torch.Tensor, labels: torch.Tensor | None, loss: Loss | None
) -> torch.Tensor:
    """The loss of the reduced model."""
    if labels is None:
        vit.reducer = Reducer()
        with torch.no_grad():
            wanted = _output(vit, images)
    else:
        wanted = labels
    vit.reducer = rates
    found = _output(vit, images)
    if loss is not None:
        return loss(found, wanted)
    if labels is not None:
        return F.cross_entropy(found, labels)
    if vit.num_classes:
        return F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)
    return 1 - F.cosine_similarity(found, wanted, dim=-1).mean()


def _output(vit: Any, images: torch.Tensor) -> torch.Tensor:
    """Logits or class tokens (B, C): a head that pools nothing gives a result for every token."""
    try:
        out = vit(images)
    except AssertionError as error:  # timm's, about the size of images
        raise InputError(f"the model does not take these images: {first_line(error)}") from error
    return out[:, : vit.class_tokens].mean(1) if out.dim() == 3 else out
