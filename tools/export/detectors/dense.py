"""Detections of one-stage heads that decode as mmdet's `BaseDenseHead` does: RetinaNet, ATSS, FCOS and others."""

import torch
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from torch import Tensor, nn

from terrazzo.errors import InputError
from terrazzo.tools.export.detectors.boxes import best, check_coder, check_nms, decoded, divided, kept, places

_INHERITED = ("predict", "predict_by_feat", "_predict_by_feat_single", "_bbox_post_process")


class DenseReader(nn.Module):
    """Reads detections from feature maps with a one-stage head.

    Args:
        detector: an mmdet single-stage detector.
        size: H, W of the image.

    Raises:
        InputError: the head decodes in its own way.
    """

    output_names = ("boxes", "scores", "labels")

    def __init__(self, detector: nn.Module, size: tuple[int, int]):
        super().__init__()
        head = detector.bbox_head
        own = [name for name in _INHERITED if getattr(type(head), name) is not getattr(BaseDenseHead, name)]
        if own or getattr(head.loss_cls, "custom_cls_channels", False):
            raise InputError(
                f"the head {type(head).__name__} decodes in its own way, which cannot be exported; heads that decode "
                "as BaseDenseHead does, such as RetinaHead, ATSSHead and FCOSHead, can"
            )
        check_coder(head.bbox_coder)
        check_nms(head.test_cfg.nms)
        self.head, self.size = head, size

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """From feature maps (1, C, H, W) to boxes (N, 4) in pixels, scores (N) and labels (N), best first."""
        head, settings = self.head, self.head.test_cfg
        outputs = head(maps)
        sizes = [level.shape[-2:] for level in outputs[0]]
        all_priors = head.prior_generator.grid_priors(sizes, dtype=maps[0].dtype, device=maps[0].device)
        levels = [
            self._candidates(priors, *(output[0].permute(1, 2, 0) for output in level))
            for priors, *level in zip(all_priors, *outputs, strict=True)
        ]
        priors, offsets, scores, factors, labels = map(torch.cat, zip(*levels, strict=True))
        found = places(scores > settings.get("score_thr", 0))
        boxes = decoded(head.bbox_coder, priors[found], offsets[found], self.size)
        scores, labels = (scores * factors)[found], labels[found]
        smallest = settings.get("min_bbox_size", -1)
        if smallest >= 0:
            large = places((boxes[:, 2:] - boxes[:, :2] > smallest).all(dim=1))
            boxes, scores, labels = boxes[large], scores[large], labels[large]
        keep = kept(boxes, scores, labels, settings.nms)[: settings.max_per_img]
        return boxes[keep], scores[keep], labels[keep]

    def _candidates(self, priors: Tensor, logits: Tensor, offsets: Tensor, factors: Tensor | None = None) -> tuple:
        """Priors, offsets, scores, factors and labels of the `nms_pre` best pairs of place and class on a level."""
        head, limit = self.head, self.head.test_cfg.get("nms_pre", -1)
        logits = logits.reshape(-1, head.cls_out_channels)
        scores = logits.sigmoid() if head.use_sigmoid_cls else logits.softmax(-1)[:, :-1]
        classes = scores.shape[1]
        scores = scores.flatten()
        # mmdet applies the threshold first; the order of the two steps makes no difference
        scores, chosen = best(scores, limit if limit >= 0 else scores.shape[0])
        place, labels = divided(chosen, classes)
        factors = scores.new_ones(scores.shape) if factors is None else factors.reshape(-1).sigmoid()[place]
        return priors[place], offsets.reshape(-1, 4)[place], scores, factors, labels
