"""mmcv's layers."""

from torch import nn

from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._operators import convolve


def _check(module: nn.Module) -> str | None:
    if getattr(module, "efficient_conv_bn_eval_forward", None) is not None:
        return "efficient_conv_bn_eval replaces its convolution's code"
    return f"padding_mode '{module.padding_mode}' is not done across ranks" if module.with_explicit_padding else None


ENTRIES = {"ConvModule": Entry(check=_check), "Conv2d": Entry(convolve), "Scale": OWN}
