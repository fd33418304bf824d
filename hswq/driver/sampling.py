"""A checkpoint's pipeline and what it is to be conditioned on."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hswq.calibration import (
    Embeddings,
    check_embeddings,
    encode_prompts,
    load_embeddings,
    load_prompts,
    prompts_hash,
    sampling_settings,
)
from hswq.config import BenchConfig, CalibrationConfig
from hswq.driver.source import Source
from hswq.errors import BackendError, InputError
from hswq.models.denoiser import denoiser_config
from hswq.models.families import FAMILIES
from hswq.models.map import ModelMap
from hswq.models.sampler import Sampler
from hswq.progress import Progress

_HASHED_BYTES = 32 << 20
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class Sampling:
    """What a checkpoint is sampled with.

    Attributes:
        pipeline: the family's, without text encoders.
        sampler: how it is called.
        conditioning: embeddings of the prompts.
        prompts: the prompts that were encoded; empty where embeddings were given.
        model_map: the map traced for the checkpoint.
        steps: sampler steps.
        guidance: guidance scale.
    """

    pipeline: Any
    sampler: Sampler
    conditioning: Embeddings
    prompts: list[str]
    model_map: ModelMap
    steps: int
    guidance: float

    @property
    def denoiser(self) -> Any:
        """The pipeline's UNet or transformer."""
        return getattr(self.pipeline, FAMILIES[self.model_map.family].component)


class Encodings:
    """Embeddings of prompts, for several checkpoints of one run that have equal text encoders."""

    def __init__(self) -> None:
        self._known: dict[str, Embeddings] = {}

    def get(self, key: str, encode: Callable[[], Embeddings]) -> Embeddings:
        """Return what is known under a key, or encode it."""
        if key not in self._known:
            self._known[key] = encode()
        return self._known[key]


def prepare_sampling(
    source: Source,
    config: CalibrationConfig,
    progress: Progress,
    *,
    vae: bool = False,
    encodings: Encodings | None = None,
) -> Sampling:
    """Encode the prompts of a run, then load what paints them.

    Args:
        source: open checkpoint.
        config: samples, prompts, components and the like.
        progress: called with (phase, prompts encoded, prompts in all).
        vae: whether images are wanted, and not latents alone.
        encodings: those of other checkpoints, which these are put to.
    Raises:
        InputError: a component or the prompts cannot be used.
        FormatError: a file is damaged.
    """
    # Runs with given statistics do without the pipeline.
    from hswq.models.offload import offload_layers
    from hswq.models.pipeline import build_pipeline
    from hswq.models.quiet import quiet_libraries

    device = resolve_device(config.device)
    folder = None if config.pipeline is None else Path(config.pipeline)
    sampler = FAMILIES[source.detection.family].sampler
    # Prompts are read before anything slow, so that a wrong file is told at once.
    prompts = load_prompts(config.calib_file) if config.embeddings is None else []
    given = None if config.embeddings is None else load_embeddings(config.embeddings)
    denoiser, _ = denoiser_config(source.checkpoint, folder, source.detection)
    steps, guidance = sampling_settings(sampler, denoiser, config)
    if given is not None:
        check_embeddings(given, sampler.embeddings(guidance), sampler.widths(denoiser))
    model_map = source.trace(config.pipeline)
    build = partial(
        build_pipeline,
        source.checkpoint,
        source.detection,
        pipeline_dir=folder,
        dtype=calibration_dtype(config, source, model_map, device),
        text_encoders=tuple(map(Path, config.text_encoder)),
        allow_download=config.allow_download,
    )
    used = prompts[: config.samples]
    held = torch.device("cpu")
    kept = held if config.sequential_offload else device
    with quiet_libraries():
        # Text encoders and denoiser are never in memory together: each may fill a card.

        def encode() -> Embeddings:
            pipeline = build(None, device=held if config.cpu_offload else kept)
            if config.sequential_offload:
                for encoder in sampler.text_encoders:
                    offload_layers(getattr(pipeline, encoder.name), device)
            elif config.cpu_offload and device.type != "cpu":
                pipeline.enable_model_cpu_offload(device=device)
            return _encode(pipeline, sampler, guidance, used, prompts_hash(prompts), progress)

        if given is not None:
            conditioning = given
        elif encodings is not None:
            conditioning = encodings.get(_encoding_key(source, sampler, guidance, config), encode)
        else:
            conditioning = encode()
        _free_cached_memory(device)
        pipeline = build(model_map, encoders=False, vae=vae, device=kept)
    sampling = Sampling(pipeline, sampler, conditioning, used, model_map, steps, guidance)
    if config.sequential_offload:
        offload_layers(sampling.denoiser, device)
    return sampling


def _encode(
    pipeline: Any,
    sampler: Sampler,
    guidance: float,
    prompts: list[str],
    label: str,
    progress: Progress,
) -> Embeddings:
    """Encode the prompts of a run; afterwards nobody holds the text encoders."""
    with torch.no_grad():
        return encode_prompts(
            prompts,
            lambda prompt: sampler.encode(pipeline, prompt, guidance),
            label,
            lambda done: progress("encode", done, len(prompts)),
        )


def _encoding_key(
    source: Source, sampler: Sampler, guidance: float, config: CalibrationConfig
) -> str:
    """Hash all that the embeddings of a run's prompts depend on, but not where it lies.

    Text encoders in the checkpoint count by their bytes, those in folders by the folders.
    """
    checkpoint = source.checkpoint
    prefixes = tuple(encoder.prefix for encoder in sampler.text_encoders)
    digest = hashlib.sha256()
    own = sorted(key for key in checkpoint.tensors if key.startswith(prefixes))
    for key in own:
        info = checkpoint.tensors[key]
        digest.update(f"{key} {info.dtype} {info.shape}\n".encode())
        for offset in range(0, info.nbytes, _HASHED_BYTES):
            length = min(_HASHED_BYTES, info.nbytes - offset)
            digest.update(checkpoint.read_bytes(key, offset, length))
    options = ("pipeline", "text_encoder", "calib_file", "samples", "calib_dtype", "device")
    facts = [getattr(config, name) for name in options]
    facts += [sampler.class_name, guidance, str(checkpoint.pipeline_dir)]
    digest.update(repr(facts).encode())
    return digest.hexdigest()


def _free_cached_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def memory_told(
    config: CalibrationConfig, *, samples: bool = True, keeps: bool = False
) -> Iterator[None]:
    """Say what a GPU without enough memory can do.

    Args:
        config: options of the command, of which some are cures.
        samples: whether the command runs the sampler.
        keeps: whether a work folder stays with what was finished.
    Raises:
        InputError: in place of torch's OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        going_on, anew = _cures(config, samples)
        text = f"the GPU has too little memory ({str(error).splitlines()[0]}). Close other programs"
        text += f" on it, or use {' or '.join([*going_on, *anew])}."
        if keeps and going_on:
            text += f" What was finished is kept, and is of use with {' and '.join(going_on)}."
        raise InputError(text) from error


def _cures(config: CalibrationConfig, samples: bool) -> tuple[list[str], list[str]]:
    """Return the options that need less memory: those that no finished part depends on, others."""
    going_on, anew = [], []
    if samples and isinstance(config, BenchConfig):
        if config.batch > 1:
            anew.append("a smaller --batch")
    elif samples and config.rounding != "nearest":
        going_on.append("a smaller --gram-memory")
    if samples:
        # What is compared cannot be offloaded.
        if not config.sequential_offload and not isinstance(config, BenchConfig):
            going_on.append("--sequential-offload")
        anew.append("a smaller --latent")
        if config.calib_dtype in ("auto", "fp32"):
            anew.append("--calib-dtype bf16")
    return going_on, [*anew, "--device cpu"]


def resolve_device(name: str) -> torch.device:
    """Return the device that `--device` asks for; auto takes a GPU where there is one.

    Raises:
        BackendError: cuda was asked for and torch sees no GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            "--device cuda was asked for, but this torch sees no GPU: use --device cpu, or install "
            "a torch build for your GPU."
        )
    # With its number: some libraries take "cuda" for the first one, whatever rank asks.
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def machine_facts(config: CalibrationConfig) -> dict[str, Any]:
    """Return what beside the options decides the bytes of a denoiser's outputs.

    Libraries choose their kernels, and so the order of their sums, by these.

    Raises:
        BackendError: cuda was asked for and torch sees no GPU.
    """
    device = resolve_device(config.device)
    if device.type == "cuda":
        return {"device": f"cuda ({torch.cuda.get_device_name(device)})"}
    return {
        "device": f"{device.type} ({torch.backends.cpu.get_cpu_capability()})",
        "threads (OMP_NUM_THREADS)": torch.get_num_threads(),
    }


def calibration_dtype(
    config: CalibrationConfig, source: Source, model_map: ModelMap, device: torch.device
) -> torch.dtype:
    """Return the dtype the denoiser runs in.

    Auto is float32 on a CPU, where 16-bit products are slow or missing, and on a GPU the dtype of
    the first layer's weight.
    """
    if config.calib_dtype != "auto":
        return _DTYPES[config.calib_dtype]
    if device.type == "cpu":
        return torch.float32
    first = model_map.sources[f"{model_map.modules[0].name}.weight"][0]
    return source.checkpoint.tensors[first.key].torch_dtype
