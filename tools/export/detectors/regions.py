"""Detections of two-stage detectors: Faster, Mask and Cascade R-CNN, from proposals to boxes and masks."""

import torch
from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor, nn
from torch.nn.functional import pad

from terrazzo.errors import InputError
from terrazzo.tools.export.detectors.boxes import best, check_coder, check_nms, coordinates, decoded, kept, places
from terrazzo.tools.export.detectors.masks import as_bytes, pasted


class RegionReader(nn.Module):
    """Reads detections from feature maps by way of proposals.

    Args:
        detector: an mmdet two-stage detector.
        size: H, W of the image.

    Raises:
        InputError: a part of it has a type that is not covered.
    """

    def __init__(self, detector: nn.Module, size: tuple[int, int]):
        super().__init__()
        self.rpn, self.roi, self.size = detector.rpn_head, detector.roi_head, size
        roi = self.roi
        _check_type(self.rpn, RPNHead)
        _check_type(roi, StandardRoIHead, CascadeRoIHead)
        if roi.with_shared_head:
            raise InputError("a roi_head with a shared_head cannot be exported; a roi_head without it can")
        self.box_heads = _stages(roi.bbox_head)
        self.box_extractors = _stages(roi.bbox_roi_extractor)
        self.mask_heads = _stages(roi.mask_head) if roi.with_mask else nn.ModuleList()
        self.mask_extractors = _stages(roi.mask_roi_extractor) if roi.with_mask else nn.ModuleList()
        for extractor in (*self.box_extractors, *self.mask_extractors):
            _check_extractor(extractor)
        for head in self.box_heads:
            _check_box_head(head)
        for head in self.mask_heads:
            _check_type(head, FCNMaskHead)
        check_coder(self.rpn.bbox_coder)
        check_nms(self.rpn.test_cfg.nms)
        check_nms(roi.test_cfg.nms)
        if roi.with_mask and roi.test_cfg.mask_thr_binary < 0:
            raise InputError("masks are exported as 0 or 1; set model.test_cfg.rcnn.mask_thr_binary to 0.5")
        self.output_names = ("boxes", "scores", "labels") + (("masks",) if roi.with_mask else ())

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """From feature maps (1, C, H, W) to boxes (N, 4), scores and labels (N), and perhaps masks (N, H, W)."""
        boxes, scores, labels = self._detections(maps, self._proposals(maps))
        if not self.mask_heads:
            return boxes, scores, labels
        return boxes, scores, labels, self._masks(maps, boxes, labels)

    def _proposals(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Boxes (N, 4) that may hold something, at most `max_per_img`."""
        rpn, settings = self.rpn, self.rpn.test_cfg
        outputs = rpn(maps)
        sizes = [level.shape[-2:] for level in outputs[0]]
        all_priors = rpn.prior_generator.grid_priors(sizes, dtype=maps[0].dtype, device=maps[0].device)
        levels = []
        for number, (priors, logits, offsets) in enumerate(zip(all_priors, *outputs, strict=True)):
            logits = logits[0].permute(1, 2, 0).reshape(-1, rpn.cls_out_channels)
            scores = (logits.sigmoid() if rpn.use_sigmoid_cls else logits.softmax(-1))[:, 0]
            limit = settings.get("nms_pre", -1)
            scores, chosen = best(scores, limit if limit > 0 else scores.shape[0])
            offsets = offsets[0].permute(1, 2, 0).reshape(-1, 4)[chosen]
            levels.append((priors[chosen], offsets, scores, torch.full_like(chosen, number)))
        priors, offsets, scores, levels = map(torch.cat, zip(*levels, strict=True))
        boxes = decoded(rpn.bbox_coder, priors, offsets, self.size)
        smallest = settings.get("min_bbox_size", -1)
        if smallest >= 0:
            large = places((boxes[:, 2:] - boxes[:, :2] > smallest).all(dim=1))
            boxes, scores, levels = boxes[large], scores[large], levels[large]
        return boxes[kept(boxes, scores, levels, settings.nms)[: settings.max_per_img]]

    def _detections(self, maps: tuple[Tensor, ...], boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and labels of the proposals (N, 4) that hold something."""
        total, last = 0, len(self.box_heads) - 1
        for stage, (head, extractor) in enumerate(zip(self.box_heads, self.box_extractors, strict=True)):
            logits, offsets = head(pooled(extractor, maps, boxes))
            offsets = offsets.unflatten(1, (-1, 4))  # N x classes x 4, or N x 1 x 4
            total = total + logits
            if stage < last:
                labels = logits[:, :-1].argmax(dim=1)
                boxes = decoded(head.bbox_coder, boxes, _of_label(offsets, labels), self.size)
        settings = self.roi.test_cfg
        scores = (total / len(self.box_heads)).softmax(dim=-1)[:, :-1]
        row, labels = coordinates(scores > settings.score_thr).unbind(1)
        boxes = decoded(self.box_heads[-1].bbox_coder, boxes[row], _of_label(offsets[row], labels), self.size)
        scores = scores[row, labels]
        keep = kept(boxes, scores, labels, settings.nms)
        keep = keep[: settings.max_per_img] if settings.max_per_img > 0 else keep
        return boxes[keep], scores[keep], labels[keep]

    def _masks(self, maps: tuple[Tensor, ...], boxes: Tensor, labels: Tensor) -> Tensor:
        """Masks (N, H, W) of 0 and 1 for boxes (N, 4)."""
        total = 0
        for head, extractor in zip(self.mask_heads, self.mask_extractors, strict=True):
            total = total + head(pooled(extractor, maps, boxes)).sigmoid()
        masks = _of_label(total / len(self.mask_heads), labels)
        return as_bytes(pasted(masks, boxes, self.size) >= self.roi.test_cfg.mask_thr_binary)


def pooled(extractor: nn.Module, maps: tuple[Tensor, ...], boxes: Tensor) -> Tensor:
    """Features of boxes, each from the map that suits its size, as mmdet's `SingleRoIExtractor` takes them.

    Args:
        extractor: has RoIAlign for each map.
        maps: 1 C H W each; only the first maps are used.
        boxes: N x 4 in pixels of the image.

    Returns:
        N C h w.
    """
    regions = pad(boxes, (1, 0))  # in front the number of the image in the batch
    layers = extractor.roi_layers
    level = extractor.map_roi_levels(regions, len(layers))
    features = boxes.new_zeros(boxes.shape[0], extractor.out_channels, *layers[0].output_size)
    for number, (layer, values) in enumerate(zip(layers, maps)):
        chosen = places(level == number)
        sizes = (layer.spatial_scale, *layer.output_size, layer.sampling_ratio, layer.aligned)
        found = torch.ops.torchvision.roi_align(values, regions[chosen], *sizes)
        features = features.index_put((chosen,), found)
    return features


def _of_label(values: Tensor, labels: Tensor) -> Tensor:
    """The values of the labels (N) among values (N, classes, ...); the only values if they are (N, 1, ...)."""
    if values.shape[1] == 1:
        return values[:, 0]
    return values[torch.arange(values.shape[0], device=values.device), labels]


def _stages(parts: nn.Module) -> nn.ModuleList:
    """The parts of each stage; a detector without cascade has one stage."""
    return parts if isinstance(parts, nn.ModuleList) else nn.ModuleList([parts])


def _check_type(part: nn.Module, *kinds: type) -> None:
    if type(part) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"a detector with {type(part).__name__} cannot be exported; a detector with {names} can")


def _check_extractor(extractor: nn.Module) -> None:
    _check_type(extractor, SingleRoIExtractor)
    for layer in extractor.roi_layers:
        if type(layer).__name__ != "RoIAlign" or layer.pool_mode != "avg":
            raise InputError(f"regions pooled by {layer} cannot be exported; RoIAlign with pool_mode avg can be")


def _check_box_head(head: nn.Module) -> None:
    check_coder(head.bbox_coder)
    own = type(head)._predict_by_feat_single is not BBoxHead._predict_by_feat_single
    if own or head.custom_cls_channels or head.custom_activation or not (head.with_reg and head.with_cls):
        raise InputError(
            f"the head {type(head).__name__} decodes in its own way, which cannot be exported; heads that decode as "
            "BBoxHead does can"
        )
