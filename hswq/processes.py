"""The processes that torchrun has started, as the environment tells."""

from __future__ import annotations

import os


def rank_of_environment() -> tuple[int, int]:
    """Return this process's number and how many there are: (0, 1) without torchrun."""
    # Job managers set the one without the other.
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
