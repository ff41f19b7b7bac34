"""The metrics of an exported file on a config's test data: the metrics of `terrazzo test`, but for the file.

Pictures go to the file as `terrazzo infer --runtime` sends them, so this is what a user of the file gets. If a config
pads pictures of many shapes and the file stretches them, the file's figures differ from the model's.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS
from mmengine.structures import InstanceData, PixelData

from terrazzo._pictures import read_picture
from terrazzo.errors import InputError
from terrazzo.tools import mm
from terrazzo.tools.console import progress
from terrazzo.tools.predict.files import FilePredictor

# The metrics that decide about a file, by task: the first group of which an evaluator gives a metric. AP is at most 1.
DECISIVE = {
    "classification": (("accuracy/top1",),),
    "segmentation": (("mIoU",),),
    "panoptic": (("coco_panoptic/PQ",),),
    "detection": (
        ("coco/bbox_mAP", "coco/segm_mAP"),
        ("coco/bbox_mAP_50", "coco/bbox_mAP_75", "coco/segm_mAP_50", "coco/segm_mAP_75"),
    ),
}


class FileMetric:
    """Measures files on a config's test data.

    Args:
        cfg: what `terrazzo.openmmlab.config.load_config` gave.

    Raises:
        InputError: the config has no test data.
    """

    def __init__(self, cfg: Config):
        if not cfg.get("test_dataloader") or not cfg.get("test_evaluator"):
            raise InputError(
                f"config {cfg.filename} has no test_dataloader and test_evaluator, so there is no metric to decide by"
            )
        self.cfg, self.task = cfg, mm.task_of(cfg)
        with mm.quiet():
            self.dataset = DATASETS.build(cfg.test_dataloader.dataset)

    def __call__(self, predictor: FilePredictor) -> dict[str, float]:
        """The points, from 0 to 100, of each decisive metric; empty if a detector finds nothing at all.

        Raises:
            InputError: the config's evaluator gives none of these metrics.
        """
        with mm.quiet():
            evaluator = Evaluator(self.cfg.test_evaluator)
            evaluator.dataset_meta = self.dataset.metainfo
            with progress("testing") as bar:
                bar.update(bar.task_ids[0], total=len(self.dataset))
                for path, sample in self._samples():
                    _fill(sample, predictor.results(read_picture(path)))
                    evaluator.process(data_samples=[sample], data_batch=None)
                    bar.advance(bar.task_ids[0])
            metrics = evaluator.evaluate(len(self.dataset))
        scale = 100 if self.task == "detection" else 1
        for group in DECISIVE[self.task]:
            points = {name: scale * float(metrics[name]) for name in group if name in metrics}
            if points or not metrics:
                return points
        names = ", ".join(name for group in DECISIVE[self.task] for name in group)
        raise InputError(f"the test_evaluator of {self.cfg.filename} gives none of {names}")

    def _samples(self) -> Iterator[tuple[Path, object]]:
        for index in range(len(self.dataset)):
            if isinstance(self.dataset, BaseDataset):
                sample = self.dataset[index]["data_samples"]
                yield Path(sample.img_path), sample
            else:
                path, label = self.dataset.images.samples[index]
                yield Path(path), {"gt_label": label}


def training_pictures(cfg: Config, count: int) -> list[Path]:
    """Pictures of a config's training data, spread evenly over it.

    Raises:
        InputError: the config names no training data.
    """
    settings = next(mm.datasets(cfg, "train"), None)
    if settings is None:
        raise InputError(f"config {cfg.filename} has no train_dataloader, so there are no images to set ranges by")
    settings = settings.copy()
    if "pipeline" in settings:
        settings.pipeline = []
    with mm.quiet():
        dataset = DATASETS.build(settings)
    picked = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().int().tolist()
    if isinstance(dataset, BaseDataset):
        return [Path(dataset.get_data_info(index)["img_path"]) for index in picked]
    return [Path(dataset.images.samples[index][0]) for index in picked]


def _fill(sample, results: dict[str, torch.Tensor]) -> None:
    """Put the results into a sample as the models of mmdet, mmseg and terrazzo do."""
    if "scores" in results and "boxes" not in results:
        sample |= {"scores": results["scores"], "pred_label": int(results["scores"].argmax())}
    elif "labels" in results and "boxes" not in results:
        sample.pred_sem_seg = PixelData(data=results["labels"][None])
    elif "segments" in results:
        sample.pred_panoptic_seg = PixelData(sem_seg=results["segments"][None])
    else:
        found = {"bboxes": results["boxes"], "scores": results["scores"], "labels": results["labels"].long()}
        if "masks" in results:
            found["masks"] = results["masks"]
        sample.pred_instances = InstanceData(**found)
