"""`terrazzo.convert_attention`: give the attention layers of an existing plain ViT of timm another mechanism."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from terrazzo.backbones._checks import wholes
from terrazzo.backbones._hosts import check_host, kind_of, make_host, remember, unmake_host, unwrapped
from terrazzo.backbones._tokens import Reducer
from terrazzo.backbones._windows import Windows
from terrazzo.backbones.mixers import Host, create_mixer
from terrazzo.errors import InputError


def _layers(layers: str | Sequence[int], depth: int) -> tuple[int, ...]:
    if layers == "all":
        return tuple(range(depth))
    if isinstance(layers, str):
        raise InputError(f"layers must be 'all' or some of 0 to {depth - 1}, got {layers!r}")
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


def convert_attention(model: nn.Module, mixer: str, layers: str | Sequence[int] = "all", **options: Any) -> nn.Module:
    """Give attention layers of a plain ViT of timm, pretrained or not, another mechanism, and return the model.

    The model is changed in place: its class, the classes of its blocks and of their attention, and, where the mechanism
    has parameters of its own, these: `blocks.<layer>.attn.mixer.<name>`. All other parameters, their names and all of
    timm's methods stay. A call changes its layers only; "softmax" restores layers. `model.conversion` says what each
    layer has, and `model.changes` says it as JSON data, together with what `terrazzo.reduce` did.

        model = terrazzo.convert_attention(timm.create_model("vit_small_patch14_dinov2", pretrained=True), "hedgehog")
        model = terrazzo.convert_attention(model, "softmax", layers=[10, 11])

    Args:
        model: timm's VisionTransformer, VisionTransformerDistilled or Eva (with rotary positions) with timm's plain
            blocks, or its wrapper for `features_only=True`; also a model that `terrazzo.reduce` changed, where the
            mechanism needs no grid.
        mixer: The mechanism, one of `terrazzo.mixers()`.
        layers: "all", or the indices of layers from 0.
        **options: Options of the mechanism: see the classes in `terrazzo.backbones.mixers`.

    Raises:
        InputError: The model is of another kind, or a mixer, a layer or an option is not valid. Nothing was changed.
    """
    given, model = model, unwrapped(model)
    check_host(model, "converted")
    depth = len(model.blocks)
    like = next(model.parameters())
    made = {
        layer: create_mixer(mixer, _host_of(model, layer), device=like.device, dtype=like.dtype, **options).train(
            model.training
        )
        for layer in _layers(layers, depth)
    }
    was_host = kind_of(model) is not type(model)
    before = [block.attn.mixer if was_host else None for block in model.blocks]
    make_host(model)
    for layer, found in made.items():
        model.blocks[layer].attn.mixer = None if mixer == "softmax" else found
    try:
        check_together(model, model.reducer)
    except InputError:
        for block, old in zip(model.blocks, before):
            block.attn.mixer = old
        raise
    if type(model.reducer) is Reducer and not model.conversion:
        unmake_host(model)
    else:
        remember(model)
    return given


def _host_of(model: Any, layer: int) -> Host:
    attn = model.blocks[layer].attn
    return Host(model.embed_dim, attn.num_heads, attn.head_dim, layer, len(model.blocks))
