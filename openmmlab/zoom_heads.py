"""Training the heads of a gated zoom: the mmengine model, its metric, and the hook that stores thresholds.

The base model is frozen. One head is trained at a time: first the region head, then the gate, then the refinement.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.dist import is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import HOOKS, METRICS, MODELS
from mmengine.runner import Runner
from torch import Tensor, nn

from terrazzo.errors import InputError
from terrazzo.gated_zoom._boxes import new_boxes
from terrazzo.gated_zoom._detector import ZoomDetector
from terrazzo.gated_zoom._fusion import enlarged, fuse, reduced
from terrazzo.gated_zoom._heads import Heads
from terrazzo.gated_zoom._labels import captured, classes_of, disagreement, gain, needs
from terrazzo.gated_zoom._zoom import Zoom, tiles_within
from terrazzo.gated_zoom._zoom import zoom as make_zoom
from terrazzo.openmmlab.checkpoint import load_checkpoint, save_checkpoint
from terrazzo.openmmlab.conversion.sharing import Aside
from terrazzo.openmmlab.saving import unwrapped

STAGES = ("region", "gate", "refine")
LABELS = ("agreement", "annotation")
SCALES = (1, 2, 4, 8)
"""The scales whose classes are compared for the gate."""
FILE = "heads.pth"
MISSED = 0.05
"""The largest share of the pictures in need that the gate may spare on the validation data."""


@MODELS.register_module()
class ZoomHeads(BaseModel):
    """Trains the heads of `terrazzo.zoom` on a frozen segmentor or detector.

    The region head learns how much a fine pass changes in each tile ("agreement", without annotation), or how much it
    corrects ("annotation"). On a detector it learns in which tiles a fine pass finds new boxes, and there is no gate.
    The gate learns whether the scale changes more than `eps` of a picture's pixels; the
    classes at scales 1, 1/2, 1/4 and 1/8 must be consistent, and pictures that need a fine pass count as much in the
    loss as all others. The refinement learns the annotated classes by cross-entropy, from the fusion of the tiles that
    the region head chooses for the budget (without a trained region head, an untrained score). Checkpoints have the
    heads alone. `ZoomHeadsHook` writes `heads.pth` with thresholds.

    Source: Q-Zoom, arXiv 2604.06912, section 3, in a form for dense prediction.

    Args:
        base: settings of a segmentor of mmsegmentation or a detector of mmdetection without masks; it should be trained
            at both scales.
        checkpoint: its weights.
        stage: "region", "gate" or "refine".
        labels: "agreement" or "annotation", what the region head learns.
        scale, tile, halo, budget, stride, batch, features: as in `terrazzo.zoom`.
        eps: share of pixels.
        data_preprocessor: not used: the segmentor has its own, which mmengine's runner also passes here.
        init_cfg: mmengine's; the heads start at random, or from `load_from`.

    Attributes:
        heads: the `terrazzo.gated_zoom.Heads`.

    Raises:
        InputError: the base model has no weights, or an option is not valid for it.
    """

    def __init__(
        self,
        base: Mapping[str, Any],
        checkpoint: str | None = None,
        stage: str = "region",
        labels: str = "agreement",
        scale: float = 4,
        tile: int = 192,
        halo: int = 32,
        budget: float = 0.25,
        stride: int = 32,
        batch: int = 8,
        features: str | None = None,
        eps: float = 0.02,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg=init_cfg)
        for name, value, known in (("stage", stage, STAGES), ("labels", labels, LABELS)):
            if value not in known:
                raise InputError(f"{name} is {value!r}; choose {' or '.join(known)}")
        if checkpoint is None:
            raise InputError("the base model has no weights: name the file of its training as model.checkpoint")
        model = revert_sync_batchnorm(MODELS.build(base))  # it is frozen, and has no batches to join
        load_checkpoint(model, checkpoint, "cpu", strict=True)
        zoom = make_zoom(model, scale, tile, halo, budget, 0, stride=stride, batch=batch, features=features)
        is_detector = isinstance(zoom, ZoomDetector)
        if is_detector and (stage != "region" or labels == "annotation"):
            raise InputError(
                f"stage={stage!r}, labels={labels!r} is for segmentors; a detector has region and agreement"
            )
        found, maps = zoom.eval().passes.with_features(torch.zeros(1, 3, 2 * stride, 2 * stride))
        if maps is None:
            raise InputError(f"a {type(model).__name__} has no backbone: name the module with features=NAME")
        self.stage, self.labels, self.eps = stage, labels, eps
        self.aside = Aside(zoom)
        self.data_preprocessor = AsInTests(model.data_preprocessor)
        self.heads = Heads(maps.shape[1], scale, tile, budget, None if is_detector else found.shape[1])
        self.heads.requires_grad_(False)
        getattr(self.heads, stage).requires_grad_(True)
        self.register_buffer("seen", torch.zeros(2), persistent=False)  # pictures of the gate: easy, in need

    @property
    def zoom(self) -> Zoom:
        """The zoom with the frozen segmentor, without heads."""
        return self.aside.model

    def forward(self, inputs: Tensor, data_samples: Sequence[Any] | None = None, mode: str = "tensor") -> Any:
        """Trains or judges a head.

        Args:
            inputs: B 3 H W, prepared for the segmentor.
            data_samples: mmseg's, with `gt_sem_seg` for labels="annotation".
            mode: "loss" gives the loss of the stage; "predict" a list of B dicts for `ZoomQuality`; "tensor" the logits
                of region head (B, rows, columns) or gate (B,), or the refined logits (B, classes, H, W).
        """
        small, grid = reduced(inputs, self.zoom.scale), self.zoom.grid(inputs)
        with torch.no_grad():
            result, features = self.zoom.passes.with_features(small)
            coarse = self.zoom.in_place(result, small, inputs)
        assert features is not None
        if self.stage == "gate":
            return self._gate(inputs, coarse, features, mode)
        if self.stage == "refine":
            return self._refine(inputs, coarse, features, data_samples, mode)
        found = self.heads.region(features, grid)
        if mode == "tensor":
            return found
        targets = self._targets(inputs, coarse, data_samples)
        if mode == "loss":
            self.heads.trained[0] = True
            return {"loss_region": F.binary_cross_entropy_with_logits(found, targets)}
        untrained = self.zoom.untrained_scores(coarse, grid)
        rows = zip(found.sigmoid().flatten(1), untrained.flatten(1), targets.flatten(1))
        most = tiles_within(self.zoom.budget, grid)
        return [dict(scores=s.cpu(), untrained=u.cpu(), targets=t.cpu(), tiles=most) for s, u, t in rows]

    def init_weights(self) -> None:
        """Leaves the weights as they are; mmengine would initialise the segmentor again."""
        self._is_init = True

    @torch.no_grad()
    def _targets(self, inputs: Tensor, found: Any, data_samples: Sequence[Any] | None) -> Tensor:
        """Targets of the region head, from a fine pass over all tiles."""
        grid, size = self.zoom.grid(inputs), inputs.shape[2:]
        every = list(range(grid.count))
        crops = self.zoom.fine(inputs, grid, [every] * len(inputs))
        if isinstance(self.zoom, ZoomDetector):
            return torch.stack([new_boxes(boxes, parts, grid) for boxes, parts in zip(found, crops)])
        coarse = enlarged(found, size)
        fine = torch.stack([fuse(y, parts, grid, every) for y, parts in zip(coarse, crops)])
        if self.labels == "agreement":
            return disagreement(coarse, fine, grid, self.zoom.passes.threshold)
        truth = self._truth(inputs, data_samples, "labels='annotation'")
        return gain(coarse, fine, truth, grid, self._ignored, self.zoom.passes.threshold)

    @property
    def _ignored(self) -> int:
        """The class of pixels that do not count."""
        return self.zoom.passes.model.decode_head.ignore_index

    def _truth(self, inputs: Tensor, data_samples: Sequence[Any] | None, who: str) -> Tensor:
        """The annotated classes (B, H, W)."""
        if not data_samples or "gt_sem_seg" not in data_samples[0]:
            raise InputError(f"{who} needs label maps, and the data has none")
        truth = torch.stack([sample.gt_sem_seg.data[0].to(inputs.device) for sample in data_samples])
        if truth.shape[1:] != inputs.shape[2:]:
            raise InputError(
                f"label maps are {tuple(truth.shape[1:])} and images {tuple(inputs.shape[2:])}: let the pipeline "
                "resize both"
            )
        return truth.long()

    def _refine(
        self, inputs: Tensor, found: Tensor, features: Tensor, data_samples: Sequence[Any] | None, mode: str
    ) -> Any:
        grid, most, heads = self.zoom.grid(inputs), tiles_within(self.zoom.budget, self.zoom.grid(inputs)), self.heads
        with torch.no_grad():
            scores = heads.region(features, grid) if heads.trained[0] else self.zoom.untrained_scores(found, grid)
            chosen = scores.flatten(1).topk(most, 1).indices.tolist()
            crops, coarse = self.zoom.fine(inputs, grid, chosen), enlarged(found, inputs.shape[2:])
        parts = list(zip(coarse, crops, chosen))
        refined = torch.stack([fuse(y, fine, grid, tiles, heads.refine) for y, fine, tiles in parts])
        if mode == "tensor":
            return refined
        truth = self._truth(inputs, data_samples, "stage='refine'")
        if mode == "loss":
            heads.trained[2] = True
            return {"loss_refine": _pixel_loss(refined, truth, self._ignored)}
        plain = torch.stack([fuse(y, fine, grid, tiles) for y, fine, tiles in parts])
        maps = (classes_of(logits, self.zoom.passes.threshold) for logits in (plain, refined))
        count = max(2, found.shape[1])
        return [
            dict(zip(("plain", "refined"), (_confusion(y, t, count, self._ignored) for y in pair)))
            for *pair, t in zip(*maps, truth)
        ]

    def _gate(self, inputs: Tensor, coarse: Tensor, features: Tensor, mode: str) -> Any:
        found = self.heads.gate(features)
        if mode == "tensor":
            return found
        answers = self._needs(inputs, coarse)
        if mode == "predict":
            return [dict(gate=float(p), need=need) for p, need in zip(found.sigmoid(), answers)]
        self.heads.trained[1] = True
        kept = [number for number, need in enumerate(answers) if need is not None]
        if not kept:  # the graph must reach the gate in every process
            return {"loss_gate": 0 * found.sum()}
        wanted = found.new_tensor([float(bool(answers[number])) for number in kept])
        self.seen += torch.stack([(1 - wanted).sum(), wanted.sum()])
        weights = (self.seen.sum() / (2 * self.seen.clamp(min=1)))[wanted.long()]
        return {"loss_gate": F.binary_cross_entropy_with_logits(found[kept], wanted, weights)}

    @torch.no_grad()
    def _needs(self, inputs: Tensor, coarse: Tensor) -> list[bool | None]:
        """For each picture whether the zoom's scale needs a fine pass; None if the scales are not consistent."""
        scales, passes = sorted({*SCALES, self.zoom.scale}), self.zoom.passes
        logits = (coarse if scale == self.zoom.scale else passes(reduced(inputs, scale)) for scale in scales)
        maps = [classes_of(enlarged(found, inputs.shape[2:]), passes.threshold) for found in logits]
        found = (needs(labels, self.eps) for labels in zip(*maps))
        return [None if answers is None else answers[scales.index(self.zoom.scale)] for answers in found]


def _pixel_loss(logits: Tensor, truth: Tensor, ignored: int) -> Tensor:
    """Mean cross-entropy of the pixels that count, of logits (B, C, H, W) and classes (B, H, W); 0 without a pixel."""
    counts = truth != ignored
    if logits.shape[1] == 1:
        each = F.binary_cross_entropy_with_logits(logits[:, 0], (truth == 1).to(logits), reduction="none")
    else:
        each = F.cross_entropy(logits, truth, ignore_index=ignored, reduction="none")
    return (each * counts).sum() / counts.sum().clamp(min=1)


def _confusion(found: Tensor, truth: Tensor, classes: int, ignored: int) -> Tensor:
    """Counts of (true, found) classes, (classes, classes)."""
    kept = (truth < classes) & (truth != ignored)
    pairs = truth[kept] * classes + found[kept]
    return torch.bincount(pairs.flatten(), minlength=classes**2).view(classes, classes).cpu()


class AsInTests(nn.Module):
    """Prepares images as in tests, also in training: whole pictures, without padding to a training size."""

    def __init__(self, preprocessor: nn.Module):
        super().__init__()
        self.preprocessor = preprocessor

    def forward(self, data: dict, training: bool = False) -> dict:
        """A batch of mmengine's data loader, as the segmentor's own preprocessor makes it in tests."""
        return self.preprocessor(data, False)


@METRICS.register_module()
class ZoomQuality(BaseMetric):
    """How good the heads of a zoom are, for a `ZoomHeads`.

    Region head: `spearman` of scores and targets over all tiles; `captured`, the share in percent of all targets that
    the best tiles of each picture have, as many as the budget allows; the same for the score that needs no training
    (`captured_untrained`: entropy, or uncertainty of boxes) and for random tiles (`captured_random`);
    `region_threshold`, above which the budget's share of all tiles lies.

    Gate: `easy_spared` and `needed_spared`, the share in percent of the pictures that the gate spares at
    `gate_threshold`; at most 5 % of the pictures in need are spared. `dropped`, the share of inconsistent pictures.

    Refinement: `miou_plain` and `miou_refined`, the mIoU in percent of the fusion without and with it, for the budget.
    """

    default_prefix = "zoom"

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Keeps the numbers of each picture."""
        self.results += data_samples

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        """The metrics of all pictures."""
        if "refined" in results[0]:
            return {
                f"miou_{name}": _miou(torch.stack([r[name] for r in results]).sum(0)) for name in ("plain", "refined")
            }
        return _of_gate(results) if "gate" in results[0] else _of_region(results)


def _miou(matrix: Tensor) -> float:
    """The mean IoU in percent over the classes that are there, of counts (true, found)."""
    both, matrix = matrix.diag().double(), matrix.double()
    return 100 * float((both / (matrix.sum(0) + matrix.sum(1) - both)).nanmean())


def _of_region(results: list[dict]) -> dict[str, float]:
    scores, targets = (torch.cat([result[name] for result in results]).float() for name in ("scores", "targets"))
    most = sum(result["tiles"] for result in results)
    from torchmetrics.functional.regression import spearman_corrcoef  # imports transformers, if that is installed

    found = {"spearman": float(spearman_corrcoef(scores, targets))}
    for name, kind in (("captured", "scores"), ("captured_untrained", "untrained")):
        got = [captured(r[kind][None], r["targets"][None], r["tiles"])[0] * r["targets"].sum() for r in results]
        found[name] = 100 * float(torch.stack(got).nan_to_num().sum() / targets.sum().clamp(min=1e-12))
    found["captured_random"] = 100 * float(
        sum(r["targets"].mean() * r["tiles"] for r in results) / targets.sum().clamp(min=1e-12)
    )
    found["region_threshold"] = float(scores.sort(descending=True).values[most]) if most < len(scores) else 0.0
    return found


def _of_gate(results: list[dict]) -> dict[str, float]:
    easy = torch.tensor([result["gate"] for result in results if result["need"] is False])
    needed = torch.tensor([result["gate"] for result in results if result["need"]])
    threshold = gate_threshold(easy, needed)
    spared = {"easy_spared": easy, "needed_spared": needed}
    found = {name: 100 * float((p < threshold).float().mean()) if len(p) else 0.0 for name, p in spared.items()}
    dropped = sum(result["need"] is None for result in results)
    return found | {"dropped": 100 * dropped / len(results), "gate_threshold": threshold}


def gate_threshold(easy: Tensor, needed: Tensor) -> float:
    """The highest threshold of the gate that spares at most 5 % of the pictures in need.

    Without a picture in need it is .5; without an easy picture it is 0, so that the gate spares nothing.

    Args:
        easy, needed: Probabilities of pictures.
    """
    if not len(easy):
        return 0.0
    return float(needed.sort().values[int(MISSED * len(needed))]) if len(needed) else 0.5


@HOOKS.register_module()
class ZoomHeadsHook(Hook):
    """Takes the thresholds from `ZoomQuality` at each validation, and writes `heads.pth` at the end of the training.

    The validation data should be a held-out part of the training data: thresholds do not transfer between checkpoints.
    """

    priority = "LOW"

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Stores the threshold of the stage in the heads."""
        heads = unwrapped(runner.model).heads
        for position, stage in enumerate(STAGES):
            value = (metrics or {}).get(f"zoom/{stage}_threshold")
            if value is not None:
                heads.thresholds[position] = value

    def after_train(self, runner: Runner) -> None:
        """Writes the heads."""
        path = Path(runner.work_dir) / FILE
        if is_main_process():
            heads = unwrapped(runner.model).heads
            state = {f"heads.{name}": value.cpu() for name, value in heads.state_dict().items()}
            save_checkpoint({"meta": {}, "state_dict": state}, str(path))
        print_log(f"{path} has the heads: terrazzo infer ... --zoom-heads {path}", logger="current")
