"""`terrazzo.convert_attention`: give the attention layers of an existing plain ViT of timm another mechanism."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from terrazzo.backbones._checks import wholes
from terrazzo.backbones._hosts import check_host, kind_of, make_host, new_mixers, remember, unmake_host, unwrapped
from terrazzo.backbones._plan import Batches, Plan, candidates, check_alike, measured
from terrazzo.backbones._tokens import Reducer
from terrazzo.backbones._windows import Windows
from terrazzo.backbones.mixers import Mixer
from terrazzo.errors import InputError

PLANNED = ("auto", "greedy")
"""Values of `layers` that choose layers by measuring."""


def _layers(layers: str | Sequence[int], depth: int) -> tuple[int, ...]:
    if layers == "all":
        return tuple(range(depth))
    if isinstance(layers, str):
        raise InputError(f"layers must be 'all' or some of 0 to {depth - 1}, or 'auto' or 'greedy', got {layers!r}")
    layers = wholes("layers", layers)
    if not all(0 <= layer < depth for layer in layers):
        raise InputError(f"layers must be some of 0 to {depth - 1}, got {layers}")
    return layers


def check_together(model: Any, reducer: Reducer) -> None:
    """Check that a reducer can run the blocks of a host whose layers have mixers.

    Raises:
        InputError: A layer's mixer needs a grid that the reducer destroys, or the reducer attends itself in a layer.
    """
    for i, block in enumerate(model.blocks):
        mixer = block.attn.mixer
        if mixer is None:
            continue
        if reducer.attends(i):
            raise InputError(f"layer {i} has the mixer {mixer.name!r}, and the reducer computes this layer's attention")
        if mixer.needs_grid and (isinstance(reducer, Windows) or i >= min(reducer.blocks, default=i + 1)):
            raise InputError(
                f"mixer {mixer.name!r} needs tokens on a grid, and the reducer changes the tokens of layer {i}: "
                f"convert only layers before, or choose a mixer without a grid"
            )


def convert_attention(
    model: nn.Module,
    mixer: str,
    layers: str | Sequence[int] | Plan = "all",
    *,
    budget: int | None = None,
    max_kl: float | None = None,
    images: Batches | None = None,
    teacher: nn.Module | None = None,
    **options: Any,
) -> nn.Module:
    """Give attention layers of a plain ViT of timm, pretrained or not, another mechanism, and return the model.

    The model is changed in place: its class, the classes of its blocks and of their attention, and, where the mechanism
    has parameters of its own, these: `blocks.<layer>.attn.mixer.<name>`. All other parameters, their names and all of
    timm's methods stay. A call changes its layers only; "softmax" restores layers. `model.conversion` says what each
    layer has, and `model.changes` says it as JSON data, together with what `terrazzo.reduce` did.

        model = terrazzo.convert_attention(timm.create_model("vit_small_patch14_dinov2", pretrained=True), "hedgehog")
        model = terrazzo.convert_attention(model, "softmax", layers=[10, 11])

    "auto" and "greedy" choose layers by a plan (`terrazzo.conversion_plan`), which measures on images how far the
    output moves. They decide about every layer that has attention or this mixer: the chosen layers get the mixer, the
    others get attention. A layer that had this mixer with these options keeps the mixer's weights.

        model = terrazzo.convert_attention(model, "hedgehog", layers="auto", budget=6, images=batches)

    A plan that was made before does the same without measuring again.

        plan = terrazzo.conversion_plan(model, "hedgehog", batches, budget=6)
        model = terrazzo.convert_attention(model, "hedgehog", layers=plan)

    Args:
        model: timm's VisionTransformer, VisionTransformerDistilled or Eva (with rotary positions) with timm's plain
            blocks, or its wrapper for `features_only=True`; also a model that `terrazzo.reduce` changed, where the
            mechanism needs no grid.
        mixer: The mechanism, one of `terrazzo.mixers()`.
        layers: "all", the indices of layers from 0, "auto", "greedy", or a plan of `terrazzo.conversion_plan`.
        budget: With "auto" and "greedy": the number of layers to convert.
        max_kl: With "auto" and "greedy": the largest divergence of the output to accept; with `budget`, both limit.
        images: With "auto" and "greedy": batches (B, 3, H, W), or one batch.
        teacher: With "auto", "greedy" and a plan: the model before training, if training changed more than the
            mixers' own weights. Layers that are not chosen get its attention's weights, too.
        **options: Options of the mechanism: see the classes in `terrazzo.backbones.mixers`.

    Raises:
        InputError: The model is of another kind, or a mixer, a layer, an option or a limit is not valid. Nothing was
            changed.
    """
    given, model = model, unwrapped(model)
    check_host(model, "converted")
    if isinstance(layers, Plan):
        made = _chosen(model, mixer, layers, dict(budget=budget, max_kl=max_kl, images=images), teacher, options)
    elif isinstance(layers, str) and layers in PLANNED:
        made = _planned(model, mixer, layers == "greedy", images, budget, max_kl, teacher, options)
    else:
        needless = dict(budget=budget, max_kl=max_kl, images=images, teacher=teacher)
        if any(value is not None for value in needless.values()):
            names = " and ".join(name for name, value in needless.items() if value is not None)
            raise InputError(f"layers='auto' and layers='greedy' take {names}, and layers is {layers!r}")
        new = new_mixers(model, mixer, _layers(layers, len(model.blocks)), options)
        made = {layer: None if mixer == "softmax" else found for layer, found in new.items()}
    was_host = kind_of(model) is not type(model)
    before = [block.attn.mixer if was_host else None for block in model.blocks]
    make_host(model)
    for layer, found in made.items():
        model.blocks[layer].attn.mixer = found
    try:
        check_together(model, model.reducer)
    except InputError:
        for block, old in zip(model.blocks, before):
            block.attn.mixer = old
        raise
    if teacher is not None:
        _restore(model, unwrapped(teacher), [layer for layer, found in made.items() if found is None])
    if type(model.reducer) is Reducer and not model.conversion:
        unmake_host(model)
    else:
        remember(model)
    return given


def _planned(
    model: Any,
    mixer: str,
    greedy: bool,
    images: Batches | None,
    budget: int | None,
    max_kl: float | None,
    teacher: nn.Module | None,
    options: Mapping[str, Any],
) -> dict[int, Mixer | None]:
    """The mixer of each layer about which a plan decides; None for attention."""
    if images is None or (budget is None and max_kl is None):
        raise InputError(
            f"layers={'greedy' if greedy else 'auto'!r} measures on images, up to a limit: give images=batches, and "
            "budget=N or max_kl=X"
        )
    plan, mixers = measured(model, mixer, images, budget, max_kl, greedy, teacher, options, together=False)
    return {layer: found if layer in plan.layers else None for layer, found in mixers.items()}


def _chosen(
    model: Any,
    mixer: str,
    plan: Plan,
    needless: Mapping[str, Any],
    teacher: nn.Module | None,
    options: Mapping[str, Any],
) -> dict[int, Mixer | None]:
    """The mixer of each layer about which a plan was made before; None for attention."""
    if given := [name for name, value in needless.items() if value is not None]:
        raise InputError(f"layers is a plan that was measured before: leave {' and '.join(given)} out")
    if mixer != plan.mixer:
        raise InputError(f"the plan is for the mixer '{plan.mixer}', and not for '{mixer}'")
    if teacher is not None:
        check_host(unwrapped(teacher), "a teacher")
        check_alike(model, unwrapped(teacher))
    mixers = candidates(model, mixer, options)
    if other := sorted(set(plan.layers) - mixers.keys()):
        raise InputError(f"the plan chose the layers {other}, which this model lacks or which have another mixer")
    return {layer: found if layer in plan.layers else None for layer, found in mixers.items()}


def _restore(model: Any, teacher: Any, layers: Sequence[int]) -> None:
    """Copy the attention of some layers of a teacher, whose shapes are equal."""
    for layer in layers:
        weights = teacher.blocks[layer].attn.state_dict()
        own = model.blocks[layer].attn.state_dict()
        model.blocks[layer].attn.load_state_dict({key: weights[key] for key in own})
