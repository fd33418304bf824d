"""The processes that torchrun has started, as the environment tells."""

from __future__ import annotations

import os

from hswq.errors import OptionError


def rank_of_environment() -> tuple[int, int]:
    """Return this process's number and how many there are: (0, 1) without torchrun.

    Raises:
        OptionError: the variables hold other things.
    """
    # Job managers set the one without the other.
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1
    given = os.environ["RANK"], os.environ["WORLD_SIZE"]
    try:
        rank, size = map(int, given)
    except ValueError:
        rank, size = -1, 0
    if not 0 <= rank < size:
        raise OptionError(
            f"the environment says RANK={given[0]!r} and WORLD_SIZE={given[1]!r}; numbers with "
            "0 <= RANK < WORLD_SIZE are needed: start the ranks with torchrun, or unset both."
        )
    return rank, size
