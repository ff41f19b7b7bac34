"""The stages that train each layer by itself, on the teacher's tokens."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from terrazzo.backbones.mixers import Mixer
from terrazzo.errors import InputError
from terrazzo.openmmlab.conversion.forcing import Forced, forced, settle
from terrazzo.openmmlab.conversion.losses import matrix_errors, token_errors
from terrazzo.openmmlab.conversion.stages import Stage

if TYPE_CHECKING:
    from terrazzo.openmmlab.conversion.model import AttentionConversion

TOKENS = 1024  # the most tokens of which a matrix is made


class LayerStage(Stage):
    """Compares layers one by one. The loss is the mean of the layers' losses.

    Attributes:
        matrices: Whether the comparison needs the teacher's matrices.
    """

    matrices = False

    def trained(self, model: "AttentionConversion") -> Iterator[nn.Parameter]:
        for layer in model.layers:
            yield from self.parameters(model, layer)

    def parameters(self, model: "AttentionConversion", layer: int) -> Iterator[nn.Parameter]:
        """The parameters of a layer that the stage trains."""
        raise NotImplementedError

    def errors(self, student: Any, given: Forced) -> tuple[Tensor, Tensor, Tensor]:
        """What a layer's loss is the mean of, and for the log the errors of all tokens, and of tokens in front."""
        raise NotImplementedError

    def losses(
        self, model: "AttentionConversion", images: Tensor, labels: Tensor | None, progress: float
    ) -> dict[str, Tensor]:
        return self.compared(model, forced(model.teacher, images, model.layers, self.matrices), progress)

    def compared(self, model: "AttentionConversion", layers: Iterable[Forced], progress: float) -> dict[str, Tensor]:
        """The terms of a step for what the teacher has in layers; any order of layers gives the same gradients."""
        losses, errors, front = {}, {}, {}
        for given in layers:
            found, every, first = self.errors(model.backbone, given)
            parameters = [p for p in self.parameters(model, given.layer) if p.requires_grad]
            losses[given.layer] = settle(found.mean() / len(model.layers), parameters)
            errors[given.layer] = every.detach().mean()
            if given.place.prefix:
                front[given.layer] = first.detach().mean()
            del found, every, first  # the layer's graph
        terms = {"loss": sum(losses[layer] for layer in sorted(losses))}
        terms |= {f"error{layer}": errors[layer] for layer in sorted(errors)}
        return terms | {f"front{layer}": front[layer] for layer in sorted(front)}


class MatrixStage(LayerStage):
    """Trains mixers, queries and keys, so that a mixer's matrix is near that of softmax attention.

    The loss of a layer is the Frobenius norm of the difference, relative to that of the teacher's matrix, as a mean
    over images and heads. What acts on values (projections, convolutions, gates) is not trained.

    Source: MOHAWK, arXiv 2408.10189, matrix orientation; the relative norm is ours.
    """

    matrices = True

    def prepare(self, model: "AttentionConversion") -> None:
        for layer in model.layers:
            mixer = model.backbone.blocks[layer].attn.mixer
            if type(mixer).weights is Mixer.weights:
                raise InputError(
                    f"layer {layer} has the mixer {mixer.name!r}, which has no matrix of weights: start with the stage "
                    "'hidden'"
                )

    def parameters(self, model: "AttentionConversion", layer: int) -> Iterator[nn.Parameter]:
        attention = model.backbone.blocks[layer].attn
        left = {id(p) for part in ("proj", "norm", "gate") for p in _part(attention, part)}
        yield from (p for p in attention.parameters() if id(p) not in left)

    def losses(
        self, model: "AttentionConversion", images: Tensor, labels: Tensor | None, progress: float
    ) -> dict[str, Tensor]:
        rows, columns = model.backbone.patch_embed.dynamic_feat_size(images.shape[2:])
        count = rows * columns + model.backbone.num_prefix_tokens
        if count > TOKENS:
            raise InputError(
                f"images of {images.shape[2]}x{images.shape[3]} have {count} tokens, and the stage 'matrix' takes at "
                f"most {TOKENS}: make the images smaller, or use the stage 'hidden'"
            )
        return super().losses(model, images, labels, progress)

    def errors(self, student: Any, given: Forced) -> tuple[Tensor, Tensor, Tensor]:
        found = student.blocks[given.layer].attn.matrix(given.given, given.rope, given.place)
        with torch.no_grad():
            front = slice(0, given.place.prefix)
            first = matrix_errors(found[:, :, front], given.matrix[:, :, front])
        every = matrix_errors(found, given.matrix)
        return every, every, first


class HiddenStage(LayerStage):
    """Trains whole attention layers, so that their outputs are near the teacher's.

    The loss of a layer is the norm of the difference over channels, relative to that of the teacher's token, as a mean
    over images and tokens.

    Source: MOHAWK, arXiv 2408.10189, hidden-state alignment; LinMU, arXiv 2601.01322, for two branches. The relative
    norm is ours.

    Args:
        target: "attention" compares outputs of attention, in front of layer scale; "block" compares tokens behind the
            block, through the student's frozen MLP.
        branch: "all", or "global" for a mixer with two branches, of which the global branch and what mixes both learn
            first. The local branch, and the host's projections, which both use, stay as they are.
    """

    def __init__(self, target: str = "attention", branch: str = "all"):
        for name, value, known in (
            ("target", target, ("attention", "block")),
            ("branch", branch, ("all", "global")),
        ):
            if value not in known:
                raise InputError(f"{name} must be '{known[0]}' or '{known[1]}', got {value!r}")
        self.target, self.branch = target, branch

    def prepare(self, model: "AttentionConversion") -> None:
        for layer in model.layers if self.branch == "global" else ():
            mixer = model.backbone.blocks[layer].attn.mixer
            if not mixer.local:
                raise InputError(
                    f"layer {layer} has the mixer {mixer.name!r}, which has one branch: branch='global' is for mixers "
                    "with two, such as 'mate'"
                )

    def parameters(self, model: "AttentionConversion", layer: int) -> Iterator[nn.Parameter]:
        attention = model.backbone.blocks[layer].attn
        if self.branch == "all":
            yield from attention.parameters()
        else:
            yield from (p for name, p in attention.mixer.named_parameters() if name not in attention.mixer.local)

    def errors(self, student: Any, given: Forced) -> tuple[Tensor, Tensor, Tensor]:
        block = student.blocks[given.layer]
        if self.target == "block":
            every = token_errors(block.placed(given.tokens, given.place, given.rope), given.left)
        else:
            every = token_errors(block.attn(given.given, rope=given.rope, attn_mask=given.place), given.attended)
        return every, every, every[:, : given.place.prefix]


def _part(module: nn.Module, name: str) -> Iterator[nn.Parameter]:
    part = getattr(module, name, None)
    return iter(()) if part is None else part.parameters()
