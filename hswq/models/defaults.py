"""torch's default dtype and device, as they are before a caller changes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Let tensors be float32 and on the CPU inside the block where nothing else is said.

    Scripts that load models often change both; pipelines, and what is built here, rely on them.
    Also a decorator.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as opened:
        # A device that is entered costs a little at every call of torch.
        if torch.get_default_device().type != "cpu":
            opened.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
