"""What the heads of a zoom learn: which tiles a fine pass changes or corrects, and which pictures need one."""

from collections.abc import Sequence

from torch import Tensor

from terrazzo.gated_zoom._scores import probabilities
from terrazzo.gated_zoom._tiles import Grid


def classes_of(logits: Tensor, threshold: float = 0.5) -> Tensor:
    """The class of each pixel, (B, H, W), of logits (B, C, H, W).

    Args:
        logits: A single channel is a foreground, class 1.
        threshold: Of the foreground's probability; not used for several channels.
    """
    return (logits[:, 0].sigmoid() > threshold).long() if logits.shape[1] == 1 else logits.argmax(1)


def disagreement(coarse: Tensor, fine: Tensor, grid: Grid, threshold: float = 0.5) -> Tensor:
    """Targets without annotation: the share of a tile's pixels that the fine pass changes, times its confidence.

    Args:
        coarse, fine: Logits (B, C, H, W) of the two passes, both in the picture's size.
        grid: The tiles.
        threshold: As in `classes_of`.

    Returns:
        (B, rows, columns), from 0 to 1.
    """
    confidence = probabilities(fine).amax(1)
    changed = classes_of(coarse, threshold) != classes_of(fine, threshold)
    return grid.pool((changed * confidence)[:, None])[:, 0]


def gain(coarse: Tensor, fine: Tensor, truth: Tensor, grid: Grid, ignored: int = 255, threshold: float = 0.5) -> Tensor:
    """Targets with annotation: by how much a fine pass lowers a tile's share of wrong pixels; 0 if it raises it.

    Args:
        coarse, fine: Logits (B, C, H, W) of the two passes, both in the picture's size.
        truth: The annotated classes (B, H, W).
        grid: The tiles.
        ignored: The class of pixels that do not count.
        threshold: As in `classes_of`.

    Returns:
        (B, rows, columns), from 0 to 1.
    """
    wrong = [((classes_of(logits, threshold) != truth) & (truth != ignored)).float() for logits in (coarse, fine)]
    return grid.pool((wrong[0] - wrong[1])[:, None])[:, 0].clamp(min=0)


def needs(labels: Sequence[Tensor], eps: float = 0.02, agreed: float = 0.95) -> list[bool] | None:
    """Whether each scale of a picture needs a finer pass, by consistency of the classes over the scales.

    Args:
        labels: Classes (H, W) at several scales, the finest first, all in the picture's size.
        eps: A scale needs a finer pass if more than this share of the pixels differs from the finest scale.
        agreed: The least share of pixels in which the two finest scales must agree.

    Returns:
        An answer for each scale; None if the two finest scales disagree, or if a coarse scale needs no finer pass and a
        finer scale does. These pictures teach nothing.
    """
    same = [float((found == labels[0]).float().mean()) for found in labels]
    if same[1] < agreed:
        return None
    answers = [1 - share > eps for share in same]
    return answers if answers == sorted(answers) else None


def captured(scores: Tensor, targets: Tensor, tiles: int) -> Tensor:
    """The sum of the targets of the best tiles of a picture, as a share of all its targets.

    Args:
        scores, targets: (B, N), of the tiles.
        tiles: How many tiles are chosen.

    Returns:
        (B,); NaN where all targets are 0.
    """
    return targets.gather(1, scores.topk(tiles, 1).indices).sum(1) / targets.sum(1)
