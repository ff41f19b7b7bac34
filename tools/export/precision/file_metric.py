"""The metrics of an exported file on a config's test data: the metrics of `terrazzo test`, but for the file.

Pictures go to the file as `terrazzo infer --runtime` sends them, so this is what a user of the file gets. If a config
pads pictures of many shapes and the file stretches them, the file's figures differ from the model's.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS
from mmengine.structures import InstanceData, PixelData
from PIL import Image
from torch import Tensor

from terrazzo._pictures import read_picture
from terrazzo.degradations.pixels import to_image
from terrazzo.errors import InputError
from terrazzo.tools import mm
from terrazzo.tools.console import progress
from terrazzo.tools.predict.files import FilePredictor

# The metrics that decide about a file, by task: the first group of which an evaluator gives a metric. AP is at most 1.
# PSNR is in dB.
DECISIVE = {
    "classification": (("accuracy/top1",),),
    "restoration": (("restoration/psnr_y",),),
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
        """The points, from 0 to 100, or the dB of each decisive metric; empty if a detector finds nothing at all.

        A restorer is measured on the middle of each picture, if a file has a smaller size.

        Raises:
            InputError: the config's evaluator gives none of these metrics.
        """
        with mm.quiet():
            evaluator = Evaluator(self.cfg.test_evaluator)
            evaluator.dataset_meta = self.dataset.metainfo
            with progress("testing") as bar:
                bar.update(bar.task_ids[0], total=len(self.dataset))
                for image, sample in self._samples(predictor):
                    _fill(sample, predictor.results(image))
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

    def _samples(self, predictor: FilePredictor) -> Iterator[tuple[Image.Image, Any]]:
        for index in range(len(self.dataset)):
            if isinstance(self.dataset, BaseDataset):
                sample = self.dataset[index]["data_samples"]
                yield read_picture(Path(sample.img_path)), sample
            elif self.task == "restoration":
                degraded, target = _middles(self.dataset[index], predictor.size)
                yield to_image(degraded), {"degraded": degraded, "target": target}
            else:
                path, label = self.dataset.images.samples[index]
                yield read_picture(Path(path)), {"gt_label": label}


def _middles(item: Mapping[str, Tensor], size: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """A degraded picture and the truth, cut to the size (H, W) of degraded pictures that a file takes at most."""
    degraded, target = item["inputs"], item["targets"]
    if size is None:
        return degraded, target
    scale = target.shape[-1] // degraded.shape[-1]
    for axis, most in zip((-2, -1), size):
        start, length = max(degraded.shape[axis] - most, 0) // 2, min(degraded.shape[axis], most)
        degraded = degraded.narrow(axis, start, length)
        target = target.narrow(axis, scale * start, scale * length)
    return degraded, target


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
    if mm.task_of(cfg) == "restoration":
        return [dataset.files[index] for index in picked]
    if isinstance(dataset, BaseDataset):
        return [Path(dataset.get_data_info(index)["img_path"]) for index in picked]
    return [Path(dataset.images.samples[index][0]) for index in picked]


def _fill(sample, results: dict[str, torch.Tensor]) -> None:
    """Put the results into a sample as the models of mmdet, mmseg and terrazzo do."""
    if "restored" in results:
        sample["restored"] = results["restored"]
    elif "scores" in results and "boxes" not in results:
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
