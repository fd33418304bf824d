"""Files of one model compared by what they paint."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hswq.calibration import Embeddings
from hswq.config import BenchConfig
from hswq.driver.job import cast_file_bytes
from hswq.driver.sampling import memory_told, prepare_sampling
from hswq.driver.source import Source, open_source
from hswq.errors import FormatError, InputError
from hswq.formats.reader import Checkpoint
from hswq.formats.writer import CheckpointWriter, TensorSpec
from hswq.loader import dequantize_module, load_transformer, load_unet, quantize_module
from hswq.models.defaults import plain_defaults
from hswq.models.detect import detect
from hswq.models.families import FAMILIES
from hswq.models.map import ModelMap
from hswq.models.quiet import quiet_libraries
from hswq.plan import LayerPlan, Plan
from hswq.progress import Progress, no_progress
from hswq.quality.bench import (
    Bench,
    Entry,
    check_images,
    following,
    measure,
    perceptual_distance,
)
from hswq.quality.images import paint
from hswq.strict_json import parse_json

NAIVE = "naive cast"
_CHUNK_BYTES = 32 << 20


@plain_defaults()
def bench_files(
    src: str | os.PathLike[str],
    files: Sequence[str | os.PathLike[str]],
    config: BenchConfig,
    *,
    progress: Progress = no_progress,
) -> Bench:
    """Paint prompts with a checkpoint, a naive FP8 cast of it, and files made from it.

    The naive cast rounds the weight of every Linear and Conv2d as it is, and nothing else. One
    denoiser is in memory at a time.

    Args:
        src: the 16-bit or 32-bit checkpoint that the files were made from.
        files: FP8 files of any container.
        config: prompts, noises, steps and the like.
        progress: called with (phase, images done, images in all).
    Raises:
        InputError: a file is of another model, a component is missing, or sequential_offload is
            asked for.
        FormatError: a file is damaged.
    """
    if config.sequential_offload:
        raise InputError(
            "files cannot be compared with sequential_offload: FP8 layers compute where their "
            "weights lie, and offloaded ones lie nowhere. Drop it, with a smaller latent or batch "
            "for a small GPU, or take device='cpu'."
        )
    paths = [Path(path) for path in files]
    seeds = list(range(config.seed, config.seed + config.seeds))
    with open_source(src) as source, quiet_libraries(), memory_told(config):
        for file in paths:
            _check_family(file, source)
        sampling = prepare_sampling(source, config, progress, vae=True)
        for file in paths:
            _check_model(file, source, sampling.model_map)
        pipeline, denoiser = sampling.pipeline, sampling.denoiser
        prompts = sampling.prompts or _numbered(sampling.conditioning, config.samples)
        family = FAMILIES[source.detection.family]
        pixels = config.latent * pipeline.vae_scale_factor
        check_images(pixels)
        painting = partial(
            paint,
            *(pipeline, sampling.sampler, sampling.conditioning, len(prompts), seeds),
            steps=sampling.steps,
            guidance=sampling.guidance,
            pixels=pixels,
            batch=config.batch,
            progress=progress,
        )
        with following(denoiser, config.calls) as recorded:
            exact = painting(phase="exact")
            trajectory = recorded()
        device, dtype = next(denoiser.parameters()).device, denoiser.dtype
        perceptual = perceptual_distance()
        settings = {
            "steps": sampling.steps,
            "guidance": sampling.guidance,
            "pixels": pixels,
            "dtype": str(dtype).removeprefix("torch."),
            "scheduler": type(pipeline.scheduler).__name__,
            "calls": len(trajectory.calls),
        }
        bench = Bench(Path(src).name, settings, prompts, seeds, exact)
        candidates: list[tuple[str, Path | None]] = [(NAIVE, None)]
        candidates += [(path.name, path) for path in paths]
        for name, path in candidates:
            # The one before goes first: each may fill the memory.
            before = getattr(pipeline, family.component)
            setattr(pipeline, family.component, None)
            if path is None:
                denoiser = _naive(before)
            else:
                del before, denoiser
                gc.collect()
                denoiser = _load(path, source, config, device, dtype)
            if device.type == "cpu":
                # Products of decoded weights are the same, and torch's own are quicker there.
                denoiser = dequantize_module(denoiser)
            setattr(pipeline, family.component, denoiser)
            painted = painting(phase=name)
            values = {
                "noise_error": trajectory.errors(denoiser, device),
                **measure(painted, exact, perceptual),
            }
            if path is None:
                size = cast_file_bytes(source, sampling.model_map)
            else:
                size = path.stat().st_size
            entry = Entry(name, size, _options(path), values, painted, has_file=path is not None)
            bench.entries.append(entry)
        if config.write_metadata:
            for entry, content, written in zip(
                bench.entries[1:], bench.to_dict()["entries"][1:], paths, strict=True
            ):
                figures = {"settings": settings, "mean": content["mean"], "ci95": content["ci95"]}
                figures |= {"prompts": len(prompts), "seeds": len(seeds)}
                _write_metadata(written, {"hswq.bench": json.dumps(figures, sort_keys=True)})
                entry.file_bytes = written.stat().st_size
    return bench


def _numbered(embeddings: Embeddings, count: int) -> list[str]:
    """Return names for prompts of which only the embeddings are known."""
    return [f"embedding {number}" for number in range(min(count, len(embeddings)))]


def _naive(denoiser: nn.Module) -> nn.Module:
    """Round every Linear and Conv2d of a denoiser to FP8 without a scale, in place."""
    layers = tuple(
        LayerPlan(
            *(name, "linear" if isinstance(part, nn.Linear) else "conv2d"),
            tuple(part.weight.shape),
            quantized=True,
            scaled=False,
            reason=NAIVE,
        )
        for name, part in denoiser.named_modules()
        if isinstance(part, (nn.Linear, nn.Conv2d))
    )
    return quantize_module(denoiser, Plan(layers, {}, 0, 0))


def _check_family(path: Path, source: Source) -> None:
    """Refuse a file of another family than the source.

    Raises:
        InputError: it is, or cannot be read.
    """
    with Checkpoint.open(path) as checkpoint:
        found = detect(checkpoint).family
    family = source.detection.family
    if found != family:
        raise InputError(
            f"'{path}' is of the family {found}, '{source.checkpoint.path}' of {family}: files of "
            "one model can be compared."
        )


def _check_model(path: Path, source: Source, model_map: ModelMap) -> None:
    """Refuse a file of another model of the family, before anything is painted.

    Files of another layout are compared when they are loaded.

    Raises:
        InputError: a tensor of the denoiser is missing or of another shape.
    """
    with Checkpoint.open(path) as checkpoint:
        found = detect(checkpoint)
        if found.layout != source.detection.layout:
            return
        for key in {part.key for parts in model_map.sources.values() for part in parts}:
            own = found.prefix + key.removeprefix(source.detection.prefix)
            info = checkpoint.tensors.get(own)
            expected = source.checkpoint.tensors[key].shape
            if info is None or info.shape != expected:
                what = "is missing" if info is None else f"is {list(info.shape)}"
                raise InputError(
                    f"'{path}' is of another model than '{source.checkpoint.path}': {own!r} {what} "
                    f"there, and {list(expected)} here. Give files that were made from this "
                    "checkpoint."
                )


def _load(
    path: Path, source: Source, config: BenchConfig, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Load a file as its users do, what is not FP8 in the dtype of the comparison."""
    family = source.detection.family
    load = load_unet if FAMILIES[family].component == "unet" else load_transformer
    folder = config.pipeline or source.checkpoint.pipeline_dir
    denoiser: nn.Module = load(path, device=device, dtype=dtype, pipeline=folder)
    return denoiser


def _options(path: Path | None) -> dict[str, Any]:
    """Return what a file's metadata say of how it was made; empty for other tools' files."""
    if path is None:
        return {}
    with Checkpoint.open(path) as checkpoint:
        try:
            text = checkpoint.metadata.get("hswq.plan", "{}")
            options = parse_json(text, "the plan", constants=True).get("options", {})
        except FormatError:
            return {}
    return dict(options) if isinstance(options, dict) else {}


def _write_metadata(path: Path, extra: dict[str, str]) -> None:
    """Write a file anew with more metadata; it is replaced when the new one is complete.

    Raises:
        InputError: the file cannot be written.
    """
    if not path.is_file():
        raise InputError(f"'{path}' is no single file: metadata are written into such only.")
    with Checkpoint.open(path) as checkpoint:
        metadata = {**checkpoint.metadata, **extra}
        tensors = checkpoint.tensors.values()
        specs = [TensorSpec(info.name, info.dtype, info.shape) for info in tensors]
        with CheckpointWriter(path, specs, len(json.dumps(metadata).encode())) as writer:
            for info in tensors:
                for offset in range(0, info.nbytes, _CHUNK_BYTES):
                    length = min(_CHUNK_BYTES, info.nbytes - offset)
                    part = checkpoint.read_bytes(info.name, offset, length)
                    writer.write_chunk(info.name, offset, part)
            writer.commit(metadata)
