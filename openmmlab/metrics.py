"""The accuracy of a classifier."""

from collections.abc import Sequence

import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS


@METRICS.register_module()
class ClassificationAccuracy(BaseMetric):
    """Top-1, top-5 (with more than five classes) and the mean accuracy over classes, in percent.

    The mean is over the classes that occur in the data: a class without images does not count.
    """

    default_prefix = "accuracy"

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Keeps the scores and the class of each image of a batch."""
        for sample in data_samples:
            self.results.append({"scores": sample["scores"].float().cpu(), "gt_label": int(sample["gt_label"])})

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        """Computes the accuracies of all images.

        Returns:
            `top1`, `top5` and `mean_class`, in percent.
        """
        # At its use: torchmetrics imports transformers where it is installed, which takes seconds.
        from torchmetrics.functional.classification import multiclass_accuracy

        scores = torch.stack([result["scores"] for result in results])
        targets = torch.tensor([result["gt_label"] for result in results])
        classes = scores.shape[1]
        metrics = {"top1": multiclass_accuracy(scores, targets, classes, average="micro")}
        if classes > 5:
            metrics["top5"] = multiclass_accuracy(scores, targets, classes, average="micro", top_k=5)
        present = torch.bincount(targets, minlength=classes) > 0
        metrics["mean_class"] = multiclass_accuracy(scores, targets, classes, average="none")[present].mean()
        return {name: 100 * float(value) for name, value in metrics.items()}
