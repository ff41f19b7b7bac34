"""Checks of pictures that are degraded on the fly: each reason why a picture is too small is told."""

import pytest
from support.restoration import write_pictures

DENOISER = "restorer-unet_dinat-mini_denoising-sigma25_1xb8-10k_pictures-128x128"
DOUBLER = "restorer-unet_dinat-mini_super-resolution-x2_1xb8-10k_pictures-128x128"


@pytest.mark.parametrize(
    ("config", "split", "size", "options", "words"),
    [
        (DENOISER, "train", (52, 127), {}, "has 52x127 pixels, less than the crop of 128; take it out, or set train"),
        (DENOISER, "val", (10, 52), {}, "has 10x52 pixels, and SSIM needs 11 on a side; take it out"),
        (DENOISER, "val", (11, 11), {}, ""),
        (DOUBLER, "val", (52, 15), {}, "has 52x15 pixels, and SSIM needs 16 on a side; take it out"),
        (DOUBLER, "test", (17, 16), {}, ""),
        (DOUBLER, "val", (52, 40), {"crop": 14}, "dataset.crop is 14, and SSIM needs 16 pixels on a side; make it"),
        (
            DOUBLER,
            "val",
            (52, 40),
            {"crop": 48},
            "has 52x40 pixels, less than the crop of 48; take it out, or set val",
        ),
        (DOUBLER, "train", (52, 1), {"crop": None, "training": False}, "has 52x1 pixels, less than the scale of 2; "),
    ],
)
def test_pictures_that_are_too_small(check, tmp_path, config, split, size, options, words):
    options = {f"{split}_dataloader.dataset.{key}": value for key, value in options.items()}
    said = check(config, write_pictures(tmp_path, size), split, **options)
    assert words in said
    assert bool(said) == bool(words)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_what_the_check_takes_the_metric_takes(scale):
    """The shortest side is the least multiple of the scale on which SSIM is defined."""
    import torch

    from terrazzo.degradations.quality import quality
    from terrazzo.errors import InputError
    from terrazzo.tools.data.checks.degraded import _measured

    side, border = _measured(scale), scale if scale > 1 else 0
    assert side % scale == 0
    quality(torch.rand(3, side, side), torch.rand(3, side, side), border)
    side -= scale
    with pytest.raises(InputError, match="too small for SSIM"):
        quality(torch.rand(3, side, side), torch.rand(3, side, side), border)
