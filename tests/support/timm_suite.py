"""A pytest plugin that points timm's own test suite at terrazzo's models.

timm's suite takes its models from `timm.list_models` when it is imported: this plugin registers terrazzo and narrows
that list. `TERRAZZO_TIMM_MODELS` holds the models to test, separated by commas.
"""

import functools
import os

import timm
import torch

import terrazzo  # noqa: F401

_MODELS = set(os.environ["TERRAZZO_TIMM_MODELS"].split(","))
_list_models = timm.list_models


@functools.cache
def _gives_tokens(name):
    """Whether the head takes tokens instead of a map."""
    model = timm.create_model(name, device="meta")
    return model.forward_features(torch.empty(1, *model.default_cfg["input_size"], device="meta")).ndim == 3


def _narrowed(filter="", module="", exclude_filters="", **kwargs):
    # The suite lists models with features of tokens by patterns of timm's names; the first pattern is "vit_*".
    tokens = None
    if "vit_*" in filter:
        filter, tokens = "", True
    elif "vit_*" in exclude_filters:
        exclude_filters, tokens = "", False
    # The suite names the modules with forward_intermediates; all of our modules have it.
    module = "" if isinstance(module, list) else module
    found = _list_models(filter, module=module, exclude_filters=exclude_filters, **kwargs)
    found = [name for name in found if name.split(".")[0] in _MODELS]
    return [name for name in found if tokens in (None, _gives_tokens(name.split(".")[0]))]


timm.list_models = _narrowed
