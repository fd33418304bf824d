"""torch's default dtype and device, as they are before a caller changes them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_lock = threading.Lock()
_inside = 0
_before = torch.float32


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Let tensors be float32 and on the CPU inside the block where nothing else is said.

    Scripts that load models often change both; pipelines, and what is built here, rely on them.
    The default dtype is the whole process's: other threads see float32 as long as one is inside,
    and the last to leave gives back what the first has found. Also a decorator.
    """
    global _inside, _before
    with ExitStack() as opened:
        # A device that is entered costs a little at every call of torch.
        if torch.get_default_device().type != "cpu":
            opened.enter_context(torch.device("cpu"))
        with _lock:
            if _inside == 0:
                _before = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            _inside += 1
        try:
            yield
        finally:
            with _lock:
                _inside -= 1
                if _inside == 0:
                    torch.set_default_dtype(_before)
