"""terrazzo: sub-quadratic vision backbones for dense prediction.

`import terrazzo` registers every model with timm, and that is all it does:

    import timm, terrazzo
    model = timm.create_model("dinat_mini", features_only=True)

`terrazzo.reduce` makes a plain timm ViT merge or drop tokens, and `terrazzo.search_rates` learns how many in which
block. `terrazzo.convert_attention` gives its attention layers another mechanism, one of `terrazzo.mixers()`,
`terrazzo.conversion_plan` measures which layers take it best, and `terrazzo.calibrate` sets its thresholds from images.
`terrazzo.reparameterize` joins the layers of a trained model that are separate for training only.
`terrazzo.feature_pyramid` makes maps of four strides from a plain model, and `terrazzo.register_pyramid` gives these
maps a name in timm. `terrazzo.Predictor` runs a model on pictures, as `terrazzo infer` does.
`terrazzo.torchvision_backbone` makes a backbone for torchvision's detectors. `terrazzo.spatial` has models compute one
huge image on several ranks, or part after part on one device. `terrazzo.zoom` has a model look again where it pays.

The order of both imports does not matter. If terrazzo comes first, it registers its models when timm is imported
(`_timm_hook`), and everything else of this module is imported at first use.
"""

import importlib
from typing import TYPE_CHECKING

from terrazzo import _timm_hook
from terrazzo._version import __version__ as __version__
from terrazzo.errors import TerrazzoError as TerrazzoError

if TYPE_CHECKING:
    from terrazzo import backbones as backbones
    from terrazzo import checkpoints as checkpoints
    from terrazzo import clips as clips
    from terrazzo import gated_zoom as gated_zoom
    from terrazzo import kernels as kernels
    from terrazzo import restoration as restoration
    from terrazzo import spatial as spatial
    from terrazzo.backbones._calibrate import calibrate as calibrate
    from terrazzo.backbones._convert import convert_attention as convert_attention
    from terrazzo.backbones._feature_pyramid import feature_pyramid as feature_pyramid
    from terrazzo.backbones._feature_pyramid import register_pyramid as register_pyramid
    from terrazzo.backbones._plan import conversion_plan as conversion_plan
    from terrazzo.backbones._reduce import reduce as reduce
    from terrazzo.backbones._reparameterize import reparameterize as reparameterize
    from terrazzo.backbones._search_rates import search_rates as search_rates
    from terrazzo.backbones.mixers import mixers as mixers
    from terrazzo.gated_zoom._zoom import zoom as zoom
    from terrazzo.integrations.torchvision import torchvision_backbone as torchvision_backbone
    from terrazzo.tools.predict.predictor import Predictor as Predictor

_PACKAGES = ("backbones", "checkpoints", "clips", "gated_zoom", "kernels", "restoration", "spatial")
_PLACES = {
    "Predictor": "terrazzo.tools.predict.predictor",
    "calibrate": "terrazzo.backbones._calibrate",
    "conversion_plan": "terrazzo.backbones._plan",
    "convert_attention": "terrazzo.backbones._convert",
    "feature_pyramid": "terrazzo.backbones._feature_pyramid",
    "mixers": "terrazzo.backbones.mixers",
    "reduce": "terrazzo.backbones._reduce",
    "register_pyramid": "terrazzo.backbones._feature_pyramid",
    "reparameterize": "terrazzo.backbones._reparameterize",
    "search_rates": "terrazzo.backbones._search_rates",
    "torchvision_backbone": "terrazzo.integrations.torchvision",
    "zoom": "terrazzo.gated_zoom._zoom",
}
"""The modules of the names that are imported at first use; the same as above, for Python."""


def __getattr__(name: str) -> object:
    """Import a name at its first use."""
    if name in _PACKAGES:
        return importlib.import_module(f"terrazzo.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module 'terrazzo' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_PLACES[name]), name)
    return value


def __dir__() -> list[str]:
    """The names of this module, with the names that are not imported yet."""
    return sorted({*globals(), *_PACKAGES, *_PLACES})


_timm_hook.register()
