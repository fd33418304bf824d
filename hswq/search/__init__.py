"""Search of the clipping threshold."""

from hswq.search.amax import AmaxResult, Layer, search_amax, search_layers

__all__ = ["AmaxResult", "Layer", "search_amax", "search_layers"]
