"""What hswq has to know of a family of models; each family is one file in `families`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hswq.errors import InputError
from hswq.formats.reader import Checkpoint
from hswq.models.sampler import Sampler

LDM_PREFIXES = ("model.diffusion_model.", "")

Shapes = dict[str, tuple[int, ...]]

_SUPPORTED = (
    "Supported are SDXL base, Flux.1 (dev and schnell), Z-Image and Qwen-Image checkpoints and "
    "their fine-tunes: single files, denoiser-only files with or without "
    "'model.diffusion_model.', sharded files and diffusers folders."
)


@dataclass(frozen=True)
class Detection:
    """What `detect` found.

    Attributes:
        family: 'sdxl', 'flux', 'z-image' or 'qwen-image'.
        layout: 'ldm' (the family's single-file names: input_blocks…, double_blocks…) or
            'diffusers' (down_blocks…, transformer_blocks…).
        prefix: what the denoiser's keys start with; may be empty.
        prediction_type: 'epsilon', 'v_prediction' or 'flow'.
        zero_terminal_snr: whether the noise schedule was rescaled to end in pure noise.
    """

    family: str
    layout: str
    prefix: str
    prediction_type: str
    zero_terminal_snr: bool


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: as in Detection.
        component: folder of the denoiser in a diffusers pipeline, 'unet' or 'transformer'.
        class_name: diffusers' class of the denoiser.
        sampler: its diffusers pipeline.
        recognize: tells whether a checkpoint with these shapes is of the family; raises InputError
            for relatives that are not supported.
        convert: runs diffusers' converter of single files on numbered rows: by the keys without
            prefix, int64 [rows] each, and the denoiser's configuration; returns them by parameter.
        config: reads the denoiser's configuration off the shapes of a single file's keys, without
            prefix; None where hswq ships one.
        unused: keys, without prefix, that feed no parameter of diffusers' class.
        dtype_modules: modules whose weight's dtype diffusers' class takes for that of its
            activations, and which therefore cannot be FP8 in a module.
        keep_presets: regular expressions of module names that a preset leaves 16-bit, by its name.
    """

    name: str
    component: str
    class_name: str
    sampler: Sampler
    recognize: Callable[[Checkpoint, Shapes], Detection | None]
    convert: Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]
    config: Callable[[Shapes], dict[str, Any]] | None = None
    unused: frozenset[str] = field(default=frozenset())
    dtype_modules: frozenset[str] = field(default=frozenset())
    keep_presets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The denoiser in words."""
        return "UNet" if self.component == "unet" else self.component


def refusal(checkpoint: Checkpoint, found: str) -> InputError:
    """Return the error that says what a checkpoint is and what is supported."""
    return InputError(f"'{checkpoint.path}' is {found}. {_SUPPORTED}")


def count_blocks(shapes: Shapes, start: str) -> int:
    """Return how many blocks `start`0., `start`1., … the keys name.

    Raises:
        InputError: one of them is missing.
    """
    numbers = {
        int(name.removeprefix(start).partition(".")[0])
        for name in shapes
        if name.startswith(start) and name.removeprefix(start).partition(".")[0].isdecimal()
    }
    if numbers != set(range(len(numbers))):
        raise InputError(
            f"the blocks {start}* are numbered {sorted(numbers)}: some are missing, and the file "
            "is damaged or a part of a model."
        )
    return len(numbers)
