"""Search of the clipping threshold."""

from hswq.search.amax import AmaxResult, search_amax

__all__ = ["AmaxResult", "search_amax"]
