"""PSNR and SSIM as BasicSR computes them."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate

from terrazzo.degradations.quality import NAMES, luma, quality
from terrazzo.errors import InputError


def test_luma_of_bt601():
    """Black is 16, white is 235, and pure green is 16 + 128.553."""
    colours = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0, 1, 0]]).T[None, :, :, None]
    assert (255 * luma(colours)).flatten().tolist() == pytest.approx([16, 235, 144.553], abs=1e-3)


def test_psnr_by_hand():
    """A difference of 5/255 in all colours is 20 log10(255 / 5) on RGB; luma's range is 219/255 of that."""
    truth = torch.full((3, 32, 32), 100 / 255)
    figures = quality(truth + 5 / 255, truth)
    assert figures["psnr_rgb"] == pytest.approx(20 * math.log10(255 / 5), abs=1e-3)
    assert figures["psnr_y"] == pytest.approx(20 * math.log10(255 / (5 * 219 / 255)), abs=1e-3)
    assert tuple(figures) == NAMES


def test_equal_pictures():
    truth = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0))
    figures = quality(truth, truth)
    assert figures["psnr_y"] == math.inf
    assert figures["ssim_rgb"] == pytest.approx(1)


def test_ssim_by_its_definition():
    """Wang et al.'s formula with a Gaussian window of 11 pixels, over the windows inside the picture, in 0..255."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(256, (3, 30, 26), generator=generator) / 255
    found = torch.randint(256, (3, 30, 26), generator=generator) / 255 * 0.5 + truth * 0.5
    found = (found * 255).round() / 255
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def mean(x):
        return correlate(x, window)[5:-5, 5:-5]

    values = []
    for x, y in zip(255 * found.double().numpy(), 255 * truth.double().numpy()):
        mx, my = mean(x), mean(y)
        vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        values.append(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())
    assert quality(found, truth)["ssim_rgb"] == pytest.approx(np.mean(values), abs=1e-5)


def test_the_border_does_not_count():
    truth = torch.rand(3, 30, 30, generator=torch.Generator().manual_seed(0))
    found = truth.clone()
    found[:, :2] = 0
    found[:, :, -2:] = 1
    assert quality(found, truth)["psnr_y"] < 30
    assert quality(found, truth, border=2)["psnr_y"] == math.inf


def test_too_small_or_unequal():
    with pytest.raises(InputError, match="too small for SSIM"):
        quality(torch.rand(3, 14, 30), torch.rand(3, 14, 30), border=2)
    with pytest.raises(InputError, match="and the truth"):
        quality(torch.rand(3, 14, 30), torch.rand(3, 30, 30))
