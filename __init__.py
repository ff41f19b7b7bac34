"""terrazzo: sub-quadratic vision backbones for dense prediction.

`import terrazzo` registers every backbone with timm, and that is all it does:

    import timm, terrazzo
    model = timm.create_model("dinat_mini", features_only=True)

`terrazzo.reduce` makes a plain timm ViT merge or drop tokens; `terrazzo.convert_attention` gives its attention layers
another mechanism, one of `terrazzo.mixers()`, and `terrazzo.calibrate` sets its thresholds from images.
`terrazzo.reparameterize` joins the layers of a trained model that are separate for training only.
`terrazzo.torchvision_backbone` makes a backbone for torchvision's detectors.
"""

from terrazzo import backbones as backbones
from terrazzo._version import __version__ as __version__
from terrazzo.backbones._calibrate import calibrate as calibrate
from terrazzo.backbones._convert import convert_attention as convert_attention
from terrazzo.backbones._reduce import reduce as reduce
from terrazzo.backbones._reparameterize import reparameterize as reparameterize
from terrazzo.backbones.mixers import mixers as mixers
from terrazzo.errors import TerrazzoError as TerrazzoError
from terrazzo.integrations.torchvision import torchvision_backbone as torchvision_backbone
