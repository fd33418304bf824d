"""Fixtures of the tests of hswq.formats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hswq.formats.dtypes import DTYPES
from tests.formats.files import random_tensor


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """One tensor of every dtype, and the shapes that real files surprise with."""
    found = {
        f"layer.{dtype.lower()}.weight": random_tensor(dtype, (3, 5), seed)
        for seed, dtype in enumerate(DTYPES)
    }
    found["v_pred"] = torch.zeros(0)
    found["ztsnr"] = torch.zeros(0, dtype=torch.float16)
    found["scalar"] = torch.tensor(3.25)
    found["rows_of_nothing"] = torch.zeros(4, 0, 2)
    found["größe.☃.weight"] = random_tensor("BF16", (7, 1, 3, 3), 99)
    return found
