"""Networks that restore pictures, registered with timm on import: pictures in, pictures out.

A family is a file of this folder with a name that does not begin with `_`. A new family needs no entry elsewhere. Every
network is a `_model.RestorationModel`: its input is (B, C, H, W) in [0, 1] with any H and W, and its output
(B, C, s H, s W), where s is the network's `upscale`.
"""

import importlib
import pkgutil

FAMILIES = tuple(
    sorted(found.name for found in pkgutil.iter_modules(__path__) if not (found.ispkg or found.name.startswith("_")))
)
"""Names of the families, which are the names of their files."""

for _family in FAMILIES:
    importlib.import_module(f"{__name__}.{_family}")
