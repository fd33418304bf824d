"""The families of models that hswq knows, in the order in which they are looked for."""

from hswq.models.families.flux import FLUX
from hswq.models.families.qwen_image import QWEN_IMAGE
from hswq.models.families.sdxl import SDXL
from hswq.models.families.z_image import Z_IMAGE
from hswq.models.family import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (FLUX, Z_IMAGE, QWEN_IMAGE, SDXL)}

__all__ = ["FAMILIES"]
