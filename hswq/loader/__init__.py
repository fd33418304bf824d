"""V2 inference: FP8 layers, and modules loaded with them from any container."""

from hswq.loader.diffusers_models import load_transformer, load_unet, register_diffusers
from hswq.loader.load import load_quantized
from hswq.loader.modules import Conv2d, Linear
from hswq.loader.quantize import dequantize_module, quantize_module, save_quantized

__all__ = [
    "Conv2d",
    "Linear",
    "dequantize_module",
    "load_quantized",
    "load_transformer",
    "load_unet",
    "quantize_module",
    "register_diffusers",
    "save_quantized",
]
