"""Bytes and names: the E4M3 table, safetensors files read and written, the FP8 containers."""

from hswq.config import CONTAINERS
from hswq.formats.e4m3 import E4M3_MAX
from hswq.formats.reader import Checkpoint, TensorInfo
from hswq.formats.writer import CheckpointWriter, TensorSpec

__all__ = [
    "CONTAINERS",
    "E4M3_MAX",
    "Checkpoint",
    "CheckpointWriter",
    "TensorInfo",
    "TensorSpec",
]
