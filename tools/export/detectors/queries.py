"""Detections of models with queries: Mask2Former (instances and panoptic segments) and DINO."""

import math

import torch
from mmdet.evaluation import INSTANCE_OFFSET
from mmdet.models.dense_heads import DETRHead, Mask2FormerHead
from mmdet.models.detectors import DINO
from mmdet.models.seg_heads.panoptic_fusion_heads import MaskFormerFusionHead
from torch import Tensor, nn
from torch.nn.functional import interpolate, softplus

from terrazzo.errors import InputError
from terrazzo.tools.export.detectors.boxes import best, clipped, divided, places
from terrazzo.tools.export.detectors.masks import as_bytes, boxes_of


class MaskQueryReader(nn.Module):
    """Reads instances and panoptic segments from feature maps with a head of mask queries.

    Args:
        detector: an mmdet Mask2Former.
        size: H, W of the image.

    Raises:
        InputError: a head is of a type that is not covered.
    """

    def __init__(self, detector: nn.Module, size: tuple[int, int]):
        super().__init__()
        self.head, self.fusion, self.size = detector.panoptic_head, detector.panoptic_fusion_head, size
        divisor = detector.data_preprocessor.pad_size_divisor
        self.padded = tuple(-(-side // divisor) * divisor for side in size)
        if type(self.head) is not Mask2FormerHead or type(self.fusion) is not MaskFormerFusionHead:
            names = f"{type(self.head).__name__} and {type(self.fusion).__name__}"
            raise InputError(f"a detector with {names} cannot be exported; Mask2FormerHead, MaskFormerFusionHead can")
        settings = self.fusion.test_cfg
        self.instances, self.panoptic = settings.get("instance_on", False), settings.get("panoptic_on", True)
        self.output_names = ("boxes", "scores", "labels", "masks") if self.instances else ()
        self.output_names += ("segments",) if self.panoptic else ()
        if not self.output_names or settings.get("semantic_on", False):
            raise InputError(
                "of Mask2Former in mmdet, instances and panoptic segments can be exported; set instance_on"
            )

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """From feature maps (1, C, H, W) to boxes (N, 4), scores and labels (N), masks (N, H, W); segments (H, W)."""
        logits, masks = (levels[-1] for levels in self.head(maps, None))
        masks = interpolate(masks, size=self.padded, mode="bilinear", align_corners=False)
        logits, masks = logits[0], masks[0, :, : self.size[0], : self.size[1]]
        found = self._instances(logits, masks) if self.instances else ()
        return (*found, self._segments(logits, masks)) if self.panoptic else found

    def _instances(self, logits: Tensor, masks: Tensor) -> tuple[Tensor, ...]:
        """Boxes, scores, labels and masks, best first, from logits (queries, classes + 1) and masks (queries, H, W)."""
        classes, things = self.fusion.num_classes, self.fusion.num_things_classes
        scores, chosen = best(logits.softmax(-1)[:, :-1].flatten(), self.fusion.test_cfg.get("max_per_image", 100))
        query, labels = divided(chosen, classes)
        inside = masks > 0
        sure = (masks.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1).to(masks.dtype) + 1e-6)
        scores = scores * sure[query]
        if things < classes:
            thing = places(labels < things)
            query, labels, scores = query[thing], labels[thing], scores[thing]
        scores, order = scores.sort(descending=True)
        query = query[order]
        return boxes_of(inside)[query], scores, labels[order], as_bytes(inside[query])

    def _segments(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Class + INSTANCE_OFFSET x number of the thing, or the number of classes where nothing is, for each pixel.

        mmdet looks at the kept queries one after the other; but each pixel belongs to one query, so this handles all at
        once.
        """
        settings, classes = self.fusion.test_cfg, self.fusion.num_classes
        scores, labels = logits.softmax(-1).max(-1)
        keep = (labels != classes) & (scores > settings.get("object_mask_thr", 0.8))
        # The largest score x sigmoid is found by its logarithm: runtimes flatten the far end of the sigmoid, which
        # would give ties far from all things.
        share = scores.log()[:, None, None] - softplus(-masks)
        owner = torch.where(keep[:, None, None], share, -math.inf).argmax(0)  # H W
        numbers = torch.arange(len(labels), device=labels.device)
        area = (owner == numbers[:, None, None]).sum((1, 2)).double()
        sure = masks >= 0  # half of the sigmoid
        whole = sure.sum((1, 2)).double()
        # an area divided by 0 is not compared, because the conditions before leave that query out
        valid = keep & (area > 0) & (whole > 0) & (area / whole.clamp(min=1) >= settings.get("iou_thr", 0.8))
        thing = valid & (labels < self.fusion.num_things_classes)
        instance = thing.float().cumsum(0).long()  # in floats, because TensorRT has no other sums
        values = labels + thing * instance * INSTANCE_OFFSET
        mine = valid[owner]
        if settings.get("filter_low_score", False):
            mine = mine & sure.gather(0, owner[None])[0]
        return torch.where(mine, values[owner], classes).to(torch.int32)


class BoxQueryReader(nn.Module):
    """Reads detections from feature maps with an encoder and a decoder of box queries.

    Args:
        detector: an mmdet DINO.
        size: H, W of the image.

    Raises:
        InputError: the detector is of another type, or its image is padded.
    """

    output_names = ("boxes", "scores", "labels")

    def __init__(self, detector: nn.Module, size: tuple[int, int]):
        super().__init__()
        head = detector.bbox_head
        own = type(head)._predict_by_feat_single is not DETRHead._predict_by_feat_single
        if type(detector) is not DINO or own or not head.loss_cls.use_sigmoid:
            raise InputError(
                f"a {type(detector).__name__} with {type(head).__name__} cannot be exported; among detectors with box "
                "queries, DINO can"
            )
        divisor = detector.data_preprocessor.pad_size_divisor
        if any(side % divisor for side in size):
            raise InputError(f"{type(detector).__name__} is exported without padding; {divisor} must divide --size H W")
        self.detector, self.size = detector, size

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """From feature maps (1, C, H, W) to boxes (N, 4), scores (N) and labels (N), best first."""
        detector = self.detector
        shapes = [tuple(level.shape[-2:]) for level in maps]
        positions = [
            detector.positional_encoding(None, input=level).flatten(2).transpose(1, 2) + embedding
            for level, embedding in zip(maps, detector.level_embed)
        ]
        known = {
            "spatial_shapes": shapes,
            "level_start_index": None,
            "valid_ratios": maps[0].new_ones(1, len(maps), 2),
        }
        encoded = detector.forward_encoder(
            feat=torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1),
            feat_mask=None,
            feat_pos=torch.cat(positions, dim=1),
            **known,
        )
        queries, _ = detector.pre_decoder(**encoded)
        decoded = detector.forward_decoder(memory_mask=None, **known, **queries)
        logits, boxes = (layers[-1][0] for layers in detector.bbox_head(**decoded))
        return self._detections(logits, boxes)

    def _detections(self, logits: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
        """Boxes, scores and labels from logits (queries, classes) and boxes (queries, 4), centre and extent in 0..1."""
        head, classes = self.detector.bbox_head, logits.shape[1]
        scores, chosen = best(logits.sigmoid().flatten(), head.test_cfg.get("max_per_img", len(logits)))
        query, labels = divided(chosen, classes)
        centre, half = boxes[query, :2], boxes[query, 2:] * 0.5
        height, width = self.size
        boxes = torch.cat([centre - half, centre + half], dim=1) * boxes.new_tensor([width, height, width, height])
        return clipped(boxes, self.size), scores, labels
