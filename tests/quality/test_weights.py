"""Weight error in dB."""

from __future__ import annotations

import math

import pytest
import torch

from hswq.quality import sqnr_db


def test_sqnr_is_the_power_ratio_in_db() -> None:
    """A factor of 100 in power is 20 dB; amplitude instead of power would give 10."""
    signal = torch.tensor([3.0, -4.0])
    assert sqnr_db(signal, signal * 0.9) == pytest.approx(20.0, abs=1e-5)


def test_sqnr_of_equal_and_of_zero_signals() -> None:
    """An exact layer is infinitely good, noise on a zero layer infinitely bad, never NaN."""
    assert sqnr_db(torch.ones(3), torch.ones(3)) == math.inf
    assert sqnr_db(torch.zeros(3), torch.zeros(3)) == math.inf
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf
