"""How near a restored picture is to the truth, as papers on restoration report it."""

from torch import Tensor

from terrazzo.degradations.pixels import in_8_bits
from terrazzo.errors import InputError, install_command

NAMES = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")

MOST_PSNR = 100.0
"""dB that count for an exact picture in a mean; else one exact picture would make the mean infinite."""

_BORDER = 5
"""Half of SSIM's window of 11 pixels: only windows inside the picture count."""


def quality(found: Tensor, truth: Tensor, border: int = 0) -> dict[str, float]:
    """PSNR in dB and SSIM, on luma and on RGB, of a picture after it is rounded to 8 bits.

    SSIM is Wang et al.'s (IEEE TIP 13(4), 2004) with a Gaussian window of 11 pixels and deviation 1.5, over the windows
    that lie inside the picture; on RGB it is the mean of the three colours. These are the figures of BasicSR.

    Args:
        found, truth: (3, H, W) in 0..1.
        border: pixels to leave out on each side: as many as the scale, for super-resolution.

    Returns:
        `psnr_y`, `ssim_y`, `psnr_rgb` and `ssim_rgb`; a PSNR of equal pictures is infinite.

    Raises:
        InputError: the sizes differ, or fewer than 11 pixels are left on a side.
        ModuleNotFoundError: torchmetrics is not installed.
    """
    try:  # at its use: torchmetrics imports transformers where it is installed, which takes seconds
        from torchmetrics.functional.image import (
            peak_signal_noise_ratio,
            structural_similarity_index_measure,
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"PSNR and SSIM need torchmetrics: {install_command('openmmlab')}", name="torchmetrics"
        ) from error
    if found.shape != truth.shape:
        raise InputError(f"the restored picture is {tuple(found.shape)}, and the truth {tuple(truth.shape)}")
    height, width = (side - 2 * border for side in truth.shape[-2:])
    if min(height, width) < 2 * _BORDER + 1:
        raise InputError(
            f"a picture of {truth.shape[-2]}x{truth.shape[-1]} pixels is too small for SSIM, whose window has "
            f"{2 * _BORDER + 1} pixels, {border} pixels from the border; take larger pictures"
        )
    inside = (slice(None), slice(border, border + height), slice(border, border + width))
    pair = [in_8_bits(pixels.float().cpu()[inside])[None] for pixels in (found, truth)]
    figures = {}
    for name, (mine, theirs) in (("y", [luma(pixels) for pixels in pair]), ("rgb", pair)):
        figures[f"psnr_{name}"] = float(peak_signal_noise_ratio(mine, theirs, data_range=1.0))
        _, windows = structural_similarity_index_measure(mine, theirs, data_range=1.0, return_full_image=True)
        figures[f"ssim_{name}"] = float(windows[..., _BORDER:-_BORDER, _BORDER:-_BORDER].mean())
    return figures


def luma(pixels: Tensor) -> Tensor:
    """Y of ITU-R BT.601 in its range of 16 to 235, as MATLAB's `rgb2ycbcr`, not rounded.

    Args:
        pixels: (B, 3, H, W), RGB in 0..1.

    Returns:
        (B, 1, H, W), in 16/255..235/255.
    """
    red, green, blue = pixels.split(1, dim=1)
    return (65.481 * red + 128.553 * green + 24.966 * blue + 16) / 255
