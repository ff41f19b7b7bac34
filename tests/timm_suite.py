"""A pytest plugin that points timm's own test suite at terrazzo's models.

timm's suite takes its models from `timm.list_models` when it is imported: this plugin registers terrazzo and narrows
that list. `TERRAZZO_TIMM_MODELS` holds the models to test, separated by commas.
"""

import os

import timm

import terrazzo  # noqa: F401

_MODELS = set(os.environ["TERRAZZO_TIMM_MODELS"].split(","))
_list_models = timm.list_models


def _narrowed(filter="", module="", exclude_filters="", **kwargs):
    # The suite names the modules with forward_intermediates; all of ours have it.
    module = "" if isinstance(module, list) else module
    found = _list_models(filter, module=module, exclude_filters=exclude_filters, **kwargs)
    return [name for name in found if name.split(".")[0] in _MODELS]


timm.list_models = _narrowed
