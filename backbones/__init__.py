"""All backbones, registered with timm on import.

A family is a file of this folder with a name that does not begin with `_`. A new family needs no entry elsewhere.
"""

import importlib
import pkgutil

FAMILIES = tuple(
    sorted(found.name for found in pkgutil.iter_modules(__path__) if not (found.ispkg or found.name.startswith("_")))
)
"""Names of the families, which are the names of their files."""

for _family in (*FAMILIES, "_rebuilt"):
    importlib.import_module(f"{__name__}.{_family}")
