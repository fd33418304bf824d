"""Search of the clipping threshold."""

from hswq.search.amax import AmaxResult, Layer, scale_of, search_amax, search_layers

__all__ = ["AmaxResult", "Layer", "scale_of", "search_amax", "search_layers"]
