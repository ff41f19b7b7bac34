"""Stages that keep the size of their map: strides become dilation, with the same weights (`output_stride`).

A stage whose downsampler has stride 1 in place of 2 has a map of twice the size. Every layer with a kernel then takes
every second position, so that it sees the same part of the image (DeepLab's atrous convolution, arXiv 1606.00915).
Layers that see the whole map, and scans, stay as they are.
"""

from torch import nn


def dilate(module: nn.Module, before: int, after: int) -> None:
    """Replace strides of 2 by dilation in a stage, in place.

    Convolutions are changed here. A module that needs something else has a method `dilate(before, after)`, which
    changes it and the modules in it.

    Args:
        before: The dilation of the map that the stage gets: the strides that stages before it gave up.
        after: The dilation in the stage, 2 `before`.
    """
    if hasattr(type(module), "dilate"):
        module.dilate(before, after)
    elif isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
        step = before if module.stride == (2, 2) else after
        module.stride = (1, 1)
        module.dilation = tuple(step * side for side in module.dilation)
        module.padding = tuple(step * side for side in module.padding)
    else:
        for child in module.children():
            dilate(child, before, after)
