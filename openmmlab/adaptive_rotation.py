"""RoMA's adaptive rotation: it rotates the part of an image with most texture in place."""

from collections.abc import Sequence

import numpy as np
import torch
from torchvision.transforms.functional import rotate

from terrazzo.errors import InputError

_NEIGHBOURS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2)]


def texture_scores(image: np.ndarray, patch_size: int) -> np.ndarray:
    """How much texture each patch has: 1 minus the norm of the histogram of its local binary patterns.

    A flat patch has one pattern and a histogram of norm 1, so its score is 0.

    Args:
        image: (H, W), both multiples of `patch_size`.

    Returns:
        (H / patch_size, W / patch_size).
    """
    padded, (height, width) = np.pad(image, 1, mode="edge"), image.shape
    codes = sum(
        (padded[y : y + height, x : x + width] >= image).astype(np.int64) << bit
        for bit, (y, x) in enumerate(_NEIGHBOURS)
    )
    rows, columns = height // patch_size, width // patch_size
    patch = np.arange(rows * columns).reshape(rows, columns).repeat(patch_size, 0).repeat(patch_size, 1)
    counts = np.bincount((patch * 256 + codes).ravel(), minlength=rows * columns * 256)
    return 1 - np.linalg.norm(counts.reshape(rows, columns, 256) / patch_size**2, axis=-1)


def choose_window(scores: np.ndarray, sides: Sequence[int]) -> tuple[int, int, int]:
    """The window around the best patch that is rotated: top, left and side, in patches.

    Among the windows of the first side that hold the best patch, the window with the highest sum is taken if its mean
    is at least the image's mean. Otherwise the next side is tried; the last side is always taken.
    """
    y, x = np.unravel_index(scores.argmax(), scores.shape)
    for side in sides:
        sums = np.lib.stride_tricks.sliding_window_view(scores, (side, side)).sum((-1, -2))
        first = max(0, y - side + 1), max(0, x - side + 1)
        held = sums[first[0] : y + 1, first[1] : x + 1]
        top, left = np.unravel_index(held.argmax(), held.shape)
        if side == sides[-1] or held.max() / side**2 >= scores.mean():
            break
    return int(top) + first[0], int(left) + first[1], side


class AdaptiveRotation:
    """Rotates a window of an image by a random angle and returns the window.

    Source: RoMA, arXiv 2503.10392, section 3.2. This follows the paper's intent. The published transform differs: it
    mixes a patch's channels with its columns and swaps its row and column; it uses the norm itself as the score, so
    flat patches are the best; only the first of its three sides fits back into its place; and the image that it passes
    on as unrotated is the rotated image.

    Args:
        patch_size: side of a patch, in pixels.
        windows: sides to try, in pixels, multiples of `patch_size`, largest first.
        degrees: the largest angle, either way.

    Raises:
        InputError: A side is not a multiple of `patch_size`.
    """

    def __init__(self, patch_size: int = 16, windows: Sequence[int] = (96, 64, 32), degrees: float = 45.0):
        if not windows or any(side < patch_size or side % patch_size for side in windows):
            raise InputError(f"windows must be multiples of patch_size, {patch_size}, got {tuple(windows)}")
        self.patch_size, self.degrees = patch_size, degrees
        self.sides = [side // patch_size for side in windows]

    def __call__(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A normalised image (C, H, W) with the window rotated and its empty corners 0, and the window.

        Returns:
            (C, H, W), and top, left and side of the window in patches.

        Raises:
            InputError: The image does not divide into patches, or is smaller than a window.
        """
        height, width = image.shape[1:]
        if (
            height % self.patch_size
            or width % self.patch_size
            or min(height, width) < max(self.sides) * self.patch_size
        ):
            raise InputError(
                f"an image of {height}x{width} does not hold a window of {max(self.sides) * self.patch_size} pixels, "
                f"or does not divide into patches of {self.patch_size}; set input_size, patch_size or windows"
            )
        window = choose_window(texture_scores(image.mean(0).numpy(), self.patch_size), self.sides)
        top, left, side = (number * self.patch_size for number in window)
        angle = float(torch.empty(()).uniform_(-self.degrees, self.degrees))
        turned = image.clone()
        place = (slice(None), slice(top, top + side), slice(left, left + side))
        turned[place] = rotate(image[place], angle)
        return turned, torch.tensor(window)
