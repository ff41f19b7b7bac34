"""terrazzo: sub-quadratic vision backbones for dense prediction.

`import terrazzo` registers every backbone with timm, and that is all it does:

    import timm, terrazzo
    model = timm.create_model("dinat_mini", features_only=True)

`terrazzo.reduce` makes a plain timm ViT merge or drop tokens.
"""

from terrazzo import backbones as backbones
from terrazzo._version import __version__ as __version__
from terrazzo.backbones._reduce import reduce as reduce
from terrazzo.errors import TerrazzoError as TerrazzoError
