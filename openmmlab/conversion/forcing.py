"""Teacher forcing: each layer of a student learns by itself, from what the teacher has in that layer.

The teacher's pass goes block by block. A layer of the student runs on the teacher's own tokens, its gradients are
computed at once, and its graph is freed, before the teacher goes on. So memory is that of one layer, and no layer's
error reaches another layer.

mmengine wants one loss, from which it computes gradients (scaled, accumulated, averaged over processes, clipped). So
`settle` gives back a loss whose gradients are known already: its backward pass hands them out.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._mixer import softmax_matrix

SCALE = 2.0**10  # keeps gradients in float16 above its smallest numbers; relative errors are near 1


class Forced(NamedTuple):
    """What the teacher has in a layer.

    Attributes:
        layer: The layer's index.
        tokens: (B, N, C), the tokens in front of the block.
        given: (B, N, C), the input of its attention: normalised tokens.
        attended: (B, N, C), the output of its attention, in front of layer scale.
        left: (B, N, C), the tokens behind the block.
        matrix: (B, heads, N, N), the weights of softmax attention; None if they were not wanted.
        place: Where the tokens stand.
        rope: The rotary positions; None for none.
    """

    layer: int
    tokens: Tensor
    given: Tensor
    attended: Tensor
    left: Tensor
    matrix: Tensor | None
    place: Place
    rope: Tensor | None


def forced(teacher: Any, images: Tensor, layers: Collection[int], matrices: bool = False) -> Iterator[Forced]:
    """Run a teacher on images (B, 3, H, W), and give what it has in some layers, one layer at a time.

    Args:
        teacher: A host with softmax attention in all layers.
        images: The images.
        layers: The layers.
        matrices: Whether the weights of softmax attention are wanted.
    """
    with torch.no_grad():
        x, state = teacher._begin(images, maps=False)
    for layer, block in enumerate(teacher.blocks[: max(layers, default=-1) + 1]):
        place, rope, before, seen = state.where(), state.rope, x, []
        hook = block.attn.register_forward_hook(_noting(seen))
        try:
            with torch.no_grad():
                x = block(before, state)
        finally:
            hook.remove()
        if layer in layers:
            given, attended = seen[0][0], seen[0][-1]
            with torch.no_grad():
                matrix = softmax_matrix(*block.attn.queries_and_keys(given, rope), place) if matrices else None
            yield Forced(layer, before, given, attended, x, matrix, place, rope)


def _noting(seen: list) -> Callable:
    return lambda module, inputs, output: seen.append((*inputs, output))


class _Settled(torch.autograd.Function):
    """The value of a loss, whose gradients with regard to parameters are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, []
        return None, None, *(gradient.mul_(factor.to(gradient.dtype)) for gradient in gradients)


def settle(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Compute a loss's gradients now, free its graph, and return a loss that hands the gradients out later.

    A parameter that the loss does not depend on gets the gradient 0, so that processes that train together agree about
    the parameters that have gradients.

    Args:
        loss: A number.
        parameters: The parameters that the loss trains.
    """
    if not torch.is_grad_enabled() or not parameters:
        return loss.detach()
    scale = SCALE if torch.get_autocast_dtype(loss.device.type) == torch.float16 else 1.0
    scale = scale if torch.is_autocast_enabled(loss.device.type) else 1.0
    gradients = torch.autograd.grad(loss * scale, parameters, allow_unused=True, materialize_grads=True)
    gradients = [gradient / scale if scale != 1 else gradient for gradient in gradients]
    return _Settled.apply(loss.detach(), gradients, *parameters)
