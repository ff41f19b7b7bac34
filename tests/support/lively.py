"""Detectors with random weights that find many objects, so that an export can be compared."""

import torch

from terrazzo.tools.export import targets as export_targets
from terrazzo.tools.export.detectors import RawDetector

_REGIONS = {"rpn_head.rpn_cls": (0.0, 1.0), "rpn_head.rpn_reg": (0.0, 0.3)}
_QUERIES = {
    "panoptic_head.cls_embed": (0.0, 3.0),
    "panoptic_head.pixel_decoder.mask_feature": (0.0, 1.0),
    "panoptic_head.mask_embed.4": (0.0, 0.3),
}
_SPREADS = {
    "retinanet": {"bbox_head.retina_cls": (-4.5, 1.0), "bbox_head.retina_reg": (0.0, 0.5)},
    "fcos": {
        "bbox_head.conv_cls": (-3.0, 1.0),
        "bbox_head.conv_reg": (2.0, 1.0),
        "bbox_head.conv_centerness": (0.0, 1.0),
    },
    "mask-rcnn": {
        **_REGIONS,
        "roi_head.bbox_head.fc_cls": (0.0, 2.0),
        "roi_head.bbox_head.fc_reg": (0.0, 1.0),
        "roi_head.mask_head.conv_logits": (0.0, 2.0),
    },
    "cascade-mask-rcnn": {
        **_REGIONS,
        **{f"roi_head.bbox_head.{stage}.fc_cls": (0.0, 3.0) for stage in range(3)},
        **{f"roi_head.bbox_head.{stage}.fc_reg": (0.0, 1.0) for stage in range(3)},
        **{f"roi_head.mask_head.{stage}.conv_logits": (0.0, 2.0) for stage in range(3)},
    },
    "mask2former": _QUERIES,
    "dino-4scale": {"bbox_head.cls_branches.{last}": (-2.0, 1.0)},
}
"""The mean and spread that outputs of a detector's deciding layers get, by the first part of the config's name."""


def enliven(detector, name, size):
    """Initialise weights outside the backbone, and scale deciding layers to the mean and spread above on noise.

    Args:
        detector: built from a config, in evaluation mode; changed in place.
        name: the name of the config.
        size: the height and width of the noise.
    """
    for part, module in detector.named_modules():
        if isinstance(module, torch.nn.Embedding):  # so that queries differ
            torch.nn.init.normal_(module.weight, std=10.0)
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear)) and "backbone" not in part:
            torch.nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    if hasattr(detector, "level_embed"):  # DINO does not initialise this parameter when it is built
        torch.nn.init.normal_(detector.level_embed)
    raw = RawDetector(detector, size)
    for path, (mean, spread) in _SPREADS[name.split("_")[0]].items():
        last = len(detector.decoder.layers) - 1 if "{last}" in path else None
        layer, outputs = detector.get_submodule(path.format(last=last)), []
        hook = layer.register_forward_hook(lambda _, inputs, output, outputs=outputs: outputs.append(output))
        raw.reference(export_targets.noise(size, 1))
        hook.remove()
        channel = -1 if isinstance(layer, torch.nn.Linear) else 1
        rows = torch.cat([output.movedim(channel, -1).flatten(0, -2) for output in outputs])
        factor = spread / (rows - rows.mean(0)).std()
        layer.weight.data *= factor
        layer.bias.data = mean - factor * rows.mean(0)
