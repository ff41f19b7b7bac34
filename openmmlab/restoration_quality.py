"""PSNR and SSIM of restored pictures, beside the same figures of the degraded pictures."""

from collections.abc import Sequence

from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS

from terrazzo.degradations.bicubic import enlarged
from terrazzo.degradations.quality import MOST_PSNR, NAMES, quality


@METRICS.register_module()
class RestorationQuality(BaseMetric):
    """PSNR in dB and SSIM on Y (BT.601) and on RGB, the means over pictures; see `terrazzo.degradations.quality`.

    For super-resolution, as many pixels as the scale are left out on each side. `input_psnr_y` and so on are the same
    figures of the pictures before the network: the degraded picture, or the low-resolution picture enlarged by MATLAB's
    bicubic. The PSNR of a picture counts as 100 dB at most: an exact picture's is infinite, and so would be the mean.
    """

    default_prefix = "restoration"

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Measures each picture of a batch."""
        for sample in data_samples:
            truth, degraded = sample["target"].cpu(), sample["degraded"].float().cpu()
            scale = truth.shape[-1] // degraded.shape[-1]
            border = scale if scale > 1 else 0
            figures = quality(sample["restored"].cpu(), truth, border)
            before = quality(enlarged(degraded, scale), truth, border)
            self.results.append(figures | {f"input_{name}": value for name, value in before.items()})

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        """The means over all pictures."""
        return {name: sum(_bounded(name, result[name]) for result in results) / len(results) for name in metric_names()}


def _bounded(name: str, value: float) -> float:
    return min(value, MOST_PSNR) if "psnr" in name else value


def metric_names() -> list[str]:
    """The names of the figures."""
    return [*NAMES, *(f"input_{name}" for name in NAMES)]
