"""Metrics of images."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from hswq.quality.images import mean_interval, mse, psnr_db, ssim


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_mse_and_psnr_are_those_of_each_pair():
    """A mean over the batch would hide the worst image."""
    exact = images()
    ours = exact + torch.tensor([0.1, 0.01, 0.0]).reshape(3, 1, 1, 1)
    found = mse(ours, exact)
    assert found.tolist() == pytest.approx([1e-2, 1e-4, 0.0], rel=1e-4)
    assert psnr_db(found).tolist() == pytest.approx([20.0, 40.0, math.inf], rel=1e-4)


def test_ssim_is_one_for_equal_images_and_falls_with_noise():
    """Range and window decide its value: 1 and 7 x 7 are stated."""
    exact = images()
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    found = [
        float(ssim((exact + level * noise).clamp(0, 1), exact).mean()) for level in (0, 0.02, 0.3)
    ]
    assert found[0] == 1.0
    assert 1.0 > found[1] > found[2] > 0.0
    constant = torch.zeros(1, 3, 16, 16)
    # Against a constant offset only the luminance term counts: (2ab + c1) / (a^2 + b^2 + c1).
    assert float(ssim(constant + 0.5, constant + 0.4)) == pytest.approx(
        (2 * 0.2 + 1e-4) / (0.25 + 0.16 + 1e-4), rel=1e-6
    )


def test_interval_counts_prompts_not_images():
    """Images of one prompt are alike: counting each would make the interval far too narrow."""
    values = torch.tensor([[1.0, 1.2], [3.0, 3.2], [5.0, 5.2]]).flatten()
    mean, width = mean_interval(values, 3)
    expected = stats.t.interval(0.95, 2, loc=3.1, scale=2.0 / math.sqrt(3))
    assert mean == pytest.approx(3.1)
    assert (mean - width, mean + width) == pytest.approx(expected)
    assert mean_interval(torch.tensor([1.0, 2.0]), 1) == (1.5, math.inf)
