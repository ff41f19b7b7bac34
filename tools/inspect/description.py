"""What is known about a model without running it: cost, pyramid, weights."""

from collections.abc import Sequence

import torch
from torch import nn

from terrazzo.errors import InputError
from terrazzo.tools.inspect.measure import measure
from terrazzo.tools.inspect.trace import image_size, meta_outputs, taking
from terrazzo.tools.mechanisms import Mechanism, changed
from terrazzo.tools.models import EVERY_MODEL, build_for, family_of, pretrained_cfg, published_top1, require_model


def describe(
    name: str, size: tuple[int, int] | None = None, in_chans: int = 3, changes: Sequence[Mechanism] = ()
) -> dict:
    """All that `terrazzo info` says, as JSON-ready values.

    Args:
        name: a timm model name.
        size: H, W; None for the input size of the published weights.
        in_chans: channels of the image.
        changes: change the model, in this order.

    Raises:
        InputError: unknown name, a size that the model cannot take, or a change that does not fit the model.
    """
    require_model(name)
    bare = name.split(".", 1)[0]
    cfg = pretrained_cfg(name)
    size = image_size(tuple(cfg.input_size[1:]) if size is None else size)
    model = changed(build_for(name, size, in_chans=in_chans), changes)
    with taking(name, size):
        measured = measure(model, size, in_chans)
        output = list(meta_outputs(model, size, in_chans).shape)
    return {
        "model": name,
        "family": family_of(bare, EVERY_MODEL) or "timm",
        "changes": [change.name for change in changes],
        "input": [1, in_chans, *size],
        "params": measured.params,
        "macs": measured.macs,
        "activations": measured.activations,
        "output": output,
        "pyramid": _pyramid(name, size, in_chans),
        "weights": {
            "tag": cfg.tag or None,
            "url": cfg.url if isinstance(cfg.url, str) else None,
            "hub": cfg.hf_hub_id,
            "origin": cfg.origin_url,
            "licence": cfg.license,
            "paper": cfg.paper_name,
            "paper_ids": cfg.paper_ids,
            "top1_published": published_top1(cfg),
            "description": cfg.description,
        },
    }


def _pyramid(name: str, size: tuple[int, int], in_chans: int) -> list[dict] | None:
    """Stride, channels and output shape of each feature map; None for a model that gives none."""
    try:
        model: nn.Module = build_for(name, size, in_chans=in_chans, features_only=True)
    except (AttributeError, RuntimeError, AssertionError, InputError):
        return None
    maps = meta_outputs(model, size, in_chans)
    return [
        {"stride": stride, "channels": channels, "shape": list(map_.shape)}
        for stride, channels, map_ in zip(model.feature_info.reduction(), model.feature_info.channels(), maps)
        if isinstance(map_, torch.Tensor)
    ]
