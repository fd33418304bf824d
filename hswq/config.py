"""Every option of hswq, once.

The dataclass fields are the library's keyword names, and the command line is made from them:
`keep_ratio` is `--keep-ratio`. A field's metadata holds its help text, its range or choices and
the aliases that the seed project's scripts used.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from hswq.errors import OptionError

CONTAINERS = ("comfy", "plain", "legacy", "hswq")
FLOATS = ("fp16", "bf16", "fp32")
SEARCH_PRESETS = {"default": (4096, 200, 3), "high": (8192, 1000, 10)}
DEFAULT_KEEP_RATIO = 0.10
# Options that say how much stays 16-bit.
BUDGETS = ("keep_ratio", "keep_bytes", "target_size", "max_error")
# Options that compensated codes depend on, beside the search.
COMPENSATION = ("bias_correction", "damping", "sweeps")
# What `--preset` stands for; options that are given go before. Without one, calibration measures
# all that `best` needs, and files use all that was measured.
PRESETS: dict[str, dict[str, Any]] = {
    "seed": {
        "sensitivity": "variance",
        "rounding": "nearest",
        "bias_correction": False,
        "damping": 0.01,
        "sweeps": 4,
        "keep_ratio": DEFAULT_KEEP_RATIO,
    },
    "best": {
        "sensitivity": "impact",
        "rounding": "compensated",
        "bias_correction": True,
        "damping": 0.01,
        "sweeps": 4,
        "keep_bytes": 0.05,
    },
}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Group of the options that only the sampler reads: given statistics exclude them.
SAMPLING = "sampling"

_Config = TypeVar("_Config", bound="CalibrationConfig")


def option(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    aliases: tuple[str, ...] = (),
    metavar: str | None = None,
    group: str = "",
) -> Any:
    """Declare one option: a dataclass field whose metadata describe it to the command line."""
    metadata = {
        "help": text,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "aliases": aliases,
        "metavar": metavar,
        "group": group,
    }
    return field(default=default, metadata=metadata)


def parse_size(flag: str, text: str) -> int:
    """Return a size in bytes: '4.5GB', '4500 MB', '4GiB' or a number of bytes.

    Raises:
        OptionError: the text is no such size, or not above 0.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    try:
        size = int(float(match[1]) * unit) if match and unit else 0
        # 4.5 bytes is a forgotten unit.
        size = 0 if unit == 1 and "." in text else size
    except ValueError:
        size = 0
    if size <= 0:
        raise OptionError(
            f"{flag} is {text!r}; a size above 0 is needed, 4.5GB or 4GiB for example."
        )
    return size


def _check_range(name: str, value: Any, metadata: Any) -> None:
    flag = "--" + name.replace("_", "-")
    choices, low, high = metadata["choices"], metadata["minimum"], metadata["maximum"]
    if choices is not None and value not in choices:
        raise OptionError(f"{flag} is {value!r}; it must be one of {', '.join(choices)}.")
    if low is None and high is None:
        return
    inside = (
        math.isfinite(value) and (low is None or value >= low) and (high is None or value <= high)
    )
    if not inside:
        if high is None:
            raise OptionError(f"{flag} is {value}; it must be at least {low}.")
        raise OptionError(f"{flag} is {value}; it must lie between {low} and {high}.")


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How the denoiser is run while the hooks watch it.

    Raises:
        OptionError: a value is outside its range or contradicts another.
    """

    samples: int = option(
        32, "prompts to sample", minimum=1, aliases=("--num_calib_samples",), group=SAMPLING
    )
    steps: int | None = option(
        None,
        "sampler steps a prompt (default: SDXL 25, Flux.1-dev 28, schnell 4, Z-Image Turbo 8, "
        "Qwen-Image 50)",
        minimum=1,
        maximum=1000,
        aliases=("--num_inference_steps",),
        group=SAMPLING,
    )
    latent: int = option(
        128, "edge of the square latent (128 is 1024 pixels)", minimum=4, group=SAMPLING
    )
    guidance: float | None = option(
        None,
        "guidance scale (default: SDXL 5, Flux.1-dev 3.5, Z-Image Turbo 0, Qwen-Image 4); "
        "classifier-free guidance is off at 1 and below, in Z-Image's own scale at 0",
        minimum=0.0,
        group=SAMPLING,
    )
    seed: int = option(
        0,
        "seed of the first sample; sample i starts from seed + i",
        minimum=0,
        maximum=2**62,
        group=SAMPLING,
    )
    calib_file: str | None = option(
        None,
        "text file, one prompt a line (default: 128 prompts that hswq ships)",
        metavar="FILE",
        aliases=("--calib_file",),
        group=SAMPLING,
    )
    embeddings: str | None = option(
        None,
        "safetensors file of prompt embeddings; no text encoder is loaded",
        metavar="FILE",
        group=SAMPLING,
    )
    pipeline: str | None = option(
        None,
        "diffusers folder with the configurations, tokenizers and, where the checkpoint lacks "
        "them, the text encoders",
        metavar="DIR",
        group="calibration",
    )
    text_encoder: tuple[str, ...] = option(
        (),
        "file of one text encoder, in the names of transformers, as ComfyUI has them; may be "
        "repeated",
        metavar="FILE",
        group=SAMPLING,
    )
    allow_download: bool = option(
        False, "let missing components be fetched from the model hub", group=SAMPLING
    )
    cpu_offload: bool = option(
        False,
        "let text encoders take turns on the GPU, each as a whole",
        group=SAMPLING,
    )
    sequential_offload: bool = option(
        False,
        "keep text encoders and denoiser in main memory and bring them to the GPU layer by layer: "
        "slow, for models that do not fit",
        group=SAMPLING,
    )
    calib_dtype: str = option(
        "auto",
        "dtype the denoiser runs in; auto: float32 on the CPU, the file's own on a GPU",
        choices=("auto", "fp32", "bf16", "fp16"),
        group=SAMPLING,
    )
    activations: str = option(
        "16bit",
        "fp8: find the range of each layer's inputs and store a scale for them, so that readers "
        "may multiply in FP8",
        choices=("16bit", "fp8"),
        group="calibration",
    )
    scaled: bool = option(
        False,
        "V2: store a scale with every weight the container can scale (default: V1, no scale)",
        group="quantization",
    )
    container: str = option(
        "comfy",
        "file layout; see the README's table of containers",
        choices=CONTAINERS,
        group="quantization",
    )
    preset: str | None = option(
        None,
        "best: impact, compensated, bias-correction, keep-bytes 0.05; seed: variance, nearest, "
        "keep-ratio 0.10, as the seed project. Other options go before. Default: best, or with "
        "--stats what was measured for these",
        choices=tuple(PRESETS),
        group="measurement",
    )
    sensitivity: str = option(
        None,
        "how layers are ranked: variance of their outputs, or impact, the measured change of the "
        "denoiser's output when a layer alone is quantized",
        choices=("variance", "impact"),
        group="measurement",
    )
    calls: int = option(
        4,
        "calls of the denoiser that are recorded and replayed for --sensitivity impact",
        minimum=1,
        maximum=4096,
        group=SAMPLING,
    )
    rounding: str = option(
        None,
        "how values become codepoints: the nearest, or compensated, each error made up for by the "
        "weights that share its inputs",
        choices=("nearest", "compensated"),
        group="measurement",
    )
    bias_correction: bool = option(
        None,
        "compensated: correct biases by the mean error that rounding leaves in a layer's output",
        group="measurement",
    )
    damping: float = option(
        None,
        "compensated: share of the mean diagonal that is added to the Gram matrix (0.01)",
        minimum=1e-6,
        maximum=1e3,
        group="measurement",
    )
    sweeps: int = option(
        None,
        "compensated: how often at most all codes of a weight are chosen anew for what the others "
        "have become (4)",
        minimum=0,
        maximum=1000,
        group="measurement",
    )
    gram_memory: str = option(
        "8GB",
        "compensated: memory for Gram matrices, on a GPU at most half of what is free; layers "
        "beyond it wait for another run of the sampler",
        metavar="SIZE",
        group=SAMPLING,
    )
    search: str = option(
        "default",
        "preset of bins, candidates and refinements: 4096/200/3 or 8192/1000/10",
        choices=tuple(SEARCH_PRESETS),
        group="search",
    )
    bins: int | None = option(None, "histogram bins", minimum=16, maximum=1 << 20, group="search")
    candidates: int | None = option(
        None, "amax candidates a stage", minimum=2, maximum=100_000, group="search"
    )
    refinements: int | None = option(
        None, "refinements after the first stage", minimum=0, maximum=100, group="search"
    )
    device: str = option(
        "auto", "where to compute", choices=("auto", "cpu", "cuda"), group="compute"
    )
    backend: str | None = option(
        None,
        "kernel backend (default: cpp on the CPU, triton on a GPU)",
        choices=("reference", "cpp", "triton"),
        group="compute",
    )

    def __post_init__(self) -> None:
        self._fill_in_preset()
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if value is not None:
                _check_range(spec.name, value, spec.metadata)
        if self.embeddings is not None and self.calib_file is not None:
            raise OptionError("--embeddings and --calib-file exclude each other: give one of them.")
        if self.embeddings is not None and self.text_encoder:
            raise OptionError(
                "--embeddings and --text-encoder exclude each other: with embeddings no text "
                "encoder is loaded. Give one of them."
            )
        if self.cpu_offload and self.sequential_offload:
            raise OptionError(
                "--cpu-offload and --sequential-offload exclude each other: give one of them."
            )
        if isinstance(self.text_encoder, str):
            raise OptionError(
                f"--text-encoder is the text {self.text_encoder!r}; a tuple of texts is needed."
            )
        parse_size("--gram-memory", self.gram_memory)
        if self.bias_correction and self.rounding == "nearest":
            raise OptionError(
                "--bias-correction needs the mean inputs that compensated rounding gathers: add "
                "--rounding compensated."
            )
        if self.scaled and self.container == "plain":
            raise OptionError(
                "--container plain holds no scales, and --scaled needs them: "
                "use comfy, legacy or hswq, or drop --scaled."
            )
        if self.activations == "fp8" and self.container in ("plain", "legacy"):
            raise OptionError(
                f"--container {self.container} holds no scales of inputs, and --activations fp8 "
                "writes them: use comfy or hswq."
            )
        if not self.scaled and self.container == "legacy":
            raise OptionError(
                "--container legacy is for scaled weights: add --scaled, or use comfy or plain."
            )

    def _fill_in_preset(self) -> None:
        """Set the options that are not given as the preset says.

        The budget stays open, so that dataclasses.replace can give another.
        """
        for name, value in self._missing(PRESETS.get(self.preset or "", {})).items():
            object.__setattr__(self, name, value)

    def settled(self: _Config, measured: Mapping[str, Any] | None = None) -> _Config:
        """Return the options with those set that neither the caller nor a preset has set.

        Args:
            measured: what statistics were measured for, `Calibration.measured`; None: what
                `--preset best` stands for, where they are yet to be measured.
        Raises:
            OptionError: what is set contradicts an option that is given.
        """
        return replace(self, **self._missing(PRESETS["best"] if measured is None else measured))

    def _missing(self, levers: Mapping[str, Any]) -> dict[str, Any]:
        missing = {
            name: value
            for name, value in levers.items()
            if name not in BUDGETS and getattr(self, name) is None
        }
        if "nearest" in (self.rounding, missing.get("rounding")) and "bias_correction" in missing:
            missing["bias_correction"] = False
        return missing

    @property
    def search_settings(self) -> tuple[int, int, int]:
        """Bins, candidates and refinements: the preset, with what was set by hand in its place."""
        preset = SEARCH_PRESETS[self.search]
        given = (self.bins, self.candidates, self.refinements)
        bins, candidates, refinements = (
            known if value is None else value for value, known in zip(given, preset, strict=True)
        )
        return bins, candidates, refinements

    @property
    def compensation(self) -> dict[str, Any]:
        """The options of compensated rounding by name."""
        return {name: getattr(self, name) for name in COMPENSATION}

    @property
    def gram_bytes(self) -> int:
        """Memory for Gram matrices in bytes."""
        return parse_size("--gram-memory", self.gram_memory)


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig(CalibrationConfig):
    """What is quantized, how, and what is written. None means not set.

    Raises:
        OptionError: a value is outside its range or contradicts another.
    """

    conv: str = option(
        "fp8", "convolutions: FP8, or left 16-bit", choices=("fp8", "16bit"), group="quantization"
    )
    keep_ratio: float | None = option(
        None,
        "share of the layers left 16-bit, by number",
        minimum=0.0,
        maximum=1.0,
        aliases=("--keep_ratio",),
        group="plan",
    )
    keep_bytes: float | None = option(
        None,
        "share of the quantizable weights left 16-bit, by size",
        minimum=0.0,
        maximum=1.0,
        group="plan",
    )
    target_size: str | None = option(
        None,
        "size that the file may have, 4.5GB for example; what fits stays 16-bit",
        metavar="SIZE",
        group="plan",
    )
    max_error: float | None = option(
        None,
        "predicted relative squared error that the denoiser's output may have, with --sensitivity "
        "impact; as little as possible stays 16-bit",
        minimum=0.0,
        group="plan",
    )
    keep: tuple[str, ...] = option(
        (),
        "regular expression of layer names to leave 16-bit; may be repeated",
        metavar="REGEX",
        group="plan",
    )
    quantize: tuple[str, ...] = option(
        (),
        "regular expression of layer names to quantize, unless --keep names them; may be repeated",
        metavar="REGEX",
        group="plan",
    )
    keep_preset: str = option(
        "none",
        "named list of layers to leave 16-bit besides, unless --quantize names them; peers: those "
        "that other quantizers of this family leave alone",
        choices=("none", "peers"),
        group="plan",
    )
    stats: str | None = option(
        None,
        "statistics file of an earlier `calibrate`; no calibration is run",
        metavar="FILE",
        group="calibration",
    )
    save_stats: str | None = option(
        None, "keep the statistics of this run in FILE", metavar="FILE", group="calibration"
    )
    verify: str = option(
        "spot",
        "check after writing: spot compares some tensors, full all of them",
        choices=("spot", "full"),
        group="quantization",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(budgets) > 1:
            flags = ["--" + name.replace("_", "-") for name in budgets]
            raise OptionError(f"{' and '.join(flags)} exclude each other: give one budget.")
        if self.target_size is not None:
            parse_size("--target-size", self.target_size)
        if self.max_error is not None and self.sensitivity == "variance":
            raise OptionError("--max-error is a limit of impact: add --sensitivity impact.")
        for flag, patterns in (("--keep", self.keep), ("--quantize", self.quantize)):
            if isinstance(patterns, str):
                raise OptionError(f"{flag} is the text {patterns!r}; a tuple of texts is needed.")
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise OptionError(
                        f"{flag} {pattern!r} is not a regular expression: {error}."
                    ) from error
        if self.stats is not None:
            self._check_nothing_is_sampled()

    def _check_nothing_is_sampled(self) -> None:
        if self.save_stats is not None:
            raise OptionError(
                "--stats and --save-stats exclude each other: nothing new is measured."
            )
        given = [
            "--" + spec.name.replace("_", "-")
            for spec in dataclasses.fields(self)
            if spec.metadata["group"] == SAMPLING and getattr(self, spec.name) != spec.default
        ]
        if given:
            raise OptionError(
                f"--stats gives the statistics, so that nothing is sampled, and {', '.join(given)} "
                "would have no effect: drop that, or --stats."
            )

    @property
    def budget(self) -> tuple[str, float]:
        """Name and value of the budget; target_size is in bytes."""
        given = {name: getattr(self, name) for name in BUDGETS}
        if all(value is None for value in given.values()):
            given = PRESETS[self.preset or ("best" if self.sensitivity == "impact" else "seed")]
        name, value = next((name, given[name]) for name in BUDGETS if given.get(name) is not None)
        in_bytes = name == "target_size"
        return name, float(parse_size("--target-size", value) if in_bytes else value)


@dataclass(frozen=True, kw_only=True)
class BenchConfig(CalibrationConfig):
    """How files of one model are compared by what they paint.

    `samples` prompts are painted, each with `seeds` noises from `seed` on.

    Raises:
        OptionError: a value is outside its range or contradicts another.
    """

    samples: int = option(8, "prompts to paint", minimum=1, group=SAMPLING)
    seed: int = option(
        1_000_000,
        "seed of the first noise: far from those of calibration",
        minimum=0,
        maximum=2**62,
        group=SAMPLING,
    )
    seeds: int = option(1, "noises a prompt", minimum=1, maximum=1000, group=SAMPLING)
    batch: int = option(1, "images painted together", minimum=1, maximum=1024, group=SAMPLING)
    calls: int = option(
        16,
        "calls of the unquantized denoiser at which the files' predictions are compared",
        minimum=1,
        maximum=4096,
        group=SAMPLING,
    )
    html: str | None = option(
        None, "report with images and charts; JSON is written beside it", metavar="FILE"
    )
    write_metadata: bool = option(
        False, "write the figures into the metadata of the files that were compared"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.html is not None and not self.html.endswith(".html"):
            raise OptionError(f"--html is {self.html!r}; a name that ends in .html is needed.")
