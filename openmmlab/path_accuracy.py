"""Whether a segmentor followed the right path, on the images of `terrazzo paths`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from PIL import Image

from terrazzo.errors import InputError

_PATH = 1
"""The class of the path between the discs."""
_LONG = (1, 2)
"""The numbers of the two long contours in the instance maps."""


@METRICS.register_module()
class PathAccuracy(BaseMetric):
    """The share of images in which the path between the discs was told from the other long contour, in percent.

    An image counts if a larger share of the pixels of the path than of the other long contour has the class "path", and
    half if the shares are equal. A segmentor that does not see the discs is right in 50 percent, however well it finds
    contours. The IoU of the class "path" over all images stands beside it.

    The instance maps are in the folder `instances` beside `labels`.
    """

    default_prefix = "paths"

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Keeps the outcome and the pixels of each image of a batch.

        Raises:
            InputError: there is no instance map of the labels' size for an image, or it has no path.
        """
        for sample in data_samples:
            found, labels = (sample[key]["data"].squeeze(0).cpu().numpy() for key in ("pred_sem_seg", "gt_sem_seg"))
            found, path = found == _PATH, labels == _PATH
            instances = _instances(Path(sample["seg_map_path"]), labels.shape)
            shares = {number: found[instances == number].mean() for number in _LONG if (instances == number).any()}
            marked = [number for number in shares if path[instances == number].all()]
            if len(shares) != 2 or len(marked) != 1:
                raise InputError(f"{sample['seg_map_path']} does not mark one of two long contours; see terrazzo paths")
            (other,) = shares.keys() - set(marked)
            outcome = 0.5 * (1 + np.sign(shares[marked[0]] - shares[other]))
            self.results.append((float(outcome), int((found & path).sum()), int((found | path).sum())))

    def compute_metrics(self, results: list[tuple[float, int, int]]) -> dict[str, float]:
        """Computes the figures of all images.

        Returns:
            `accuracy` and `IoU`, in percent.
        """
        outcomes, both, either = (sum(values) for values in zip(*results))
        return {"accuracy": 100 * outcomes / len(results), "IoU": 100 * both / either}


def _instances(labels: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The instance map that belongs to a label map ROOT/labels/SPLIT/NAME."""
    path = labels.parents[2] / "instances" / labels.parent.name / labels.name
    if not path.is_file():
        raise InputError(f"there is no instance map {path}; make the data with terrazzo paths")
    with Image.open(path) as picture:
        instances = np.asarray(picture)
    if instances.shape != shape:
        raise InputError(f"{path} has the size {instances.shape}, and its labels {shape}")
    return instances
