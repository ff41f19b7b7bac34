"""How near a student is to its teacher on data that it was not trained on."""

from collections.abc import Sequence

import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS


@METRICS.register_module()
class Fidelity(BaseMetric):
    """Means over images, for an `AttentionConversion`.

    Metrics: `kl` (logits, or final tokens without a head), `cosine` of the final tokens, `agreement` (images with the
    teacher's class, in percent, with a head), `error`, the mean over layers of the relative error of the attention's
    output on the teacher's tokens, and the same for each layer, `error0`, ..., and for the class token and registers
    alone, `front`, `front0`, ...
    """

    default_prefix = "teacher"

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Keeps the numbers of each image of a batch."""
        for sample in data_samples:
            numbers = {name: float(value) for name, value in sample["errors"].items()}
            numbers |= {"kl": float(sample["kl"]), "cosine": float(sample["cosine"])}
            if "teacher_label" in sample:
                numbers["agreement"] = 100.0 * (sample["pred_label"] == sample["teacher_label"])
            self.results.append(numbers)

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        """Computes the means of all images."""
        means = {name: float(torch.tensor([result[name] for result in results]).double().mean()) for name in results[0]}
        layers = {
            kind: [value for name, value in means.items() if name.startswith(kind)] for kind in ("error", "front")
        }
        named = ("agreement", "kl", "cosine")
        found = {name: means[name] for name in named if name in means}
        found |= {kind: sum(values) / len(values) for kind, values in layers.items() if values}
        return found | {name: value for name, value in means.items() if name not in found}
