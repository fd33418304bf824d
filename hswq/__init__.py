"""hswq: hybrid sensitivity weighted quantization of diffusion models to FP8 E4M3.

The public names below are resolved at first use, so that `import hswq` loads neither torch nor
a GPU runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hswq.calibration import Calibration as Calibration
    from hswq.calibration import observe as observe
    from hswq.config import CalibrationConfig as CalibrationConfig
    from hswq.config import QuantizeConfig as QuantizeConfig
    from hswq.driver import Report as Report
    from hswq.driver import calibrate_checkpoint as calibrate_checkpoint
    from hswq.driver import convert_checkpoint as convert_checkpoint
    from hswq.driver import dequantize_checkpoint as dequantize_checkpoint
    from hswq.driver import quantize_checkpoint as quantize_checkpoint
    from hswq.loader import Conv2d as Conv2d
    from hswq.loader import Linear as Linear
    from hswq.loader import load_quantized as load_quantized
    from hswq.loader import load_transformer as load_transformer
    from hswq.loader import load_unet as load_unet
    from hswq.loader import quantize_module as quantize_module
    from hswq.loader import register_diffusers as register_diffusers
    from hswq.loader import save_quantized as save_quantized
    from hswq.plan import Plan as Plan
    from hswq.plan import make_plan as make_plan
    from hswq.search import AmaxResult as AmaxResult
    from hswq.search import search_amax as search_amax

__version__ = "0.1.0"

_HOME = {
    "AmaxResult": "hswq.search",
    "Calibration": "hswq.calibration",
    "CalibrationConfig": "hswq.config",
    "Conv2d": "hswq.loader",
    "Linear": "hswq.loader",
    "Plan": "hswq.plan",
    "QuantizeConfig": "hswq.config",
    "Report": "hswq.driver",
    "calibrate_checkpoint": "hswq.driver",
    "convert_checkpoint": "hswq.driver",
    "dequantize_checkpoint": "hswq.driver",
    "load_quantized": "hswq.loader",
    "load_transformer": "hswq.loader",
    "load_unet": "hswq.loader",
    "make_plan": "hswq.plan",
    "observe": "hswq.calibration",
    "quantize_checkpoint": "hswq.driver",
    "quantize_module": "hswq.loader",
    "register_diffusers": "hswq.loader",
    "save_quantized": "hswq.loader",
    "search_amax": "hswq.search",
}
_SUBMODULES = frozenset({"compat", "config", "errors", "formats", "kernels"})

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"hswq.{name}")
    raise AttributeError(f"module 'hswq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_SUBMODULES])
