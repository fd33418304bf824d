"""The diffusers pipeline of a checkpoint, from its own components as far as it has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hswq.errors import InputError
from hswq.formats.reader import Checkpoint
from hswq.models.components import ComponentLoader
from hswq.models.denoiser import denoiser_config, load_denoiser
from hswq.models.families import FAMILIES
from hswq.models.family import Detection, Family
from hswq.models.map import ModelMap
from hswq.models.quiet import quiet_libraries


def build_pipeline(
    checkpoint: Checkpoint,
    detection: Detection,
    model_map: ModelMap | None,
    *,
    pipeline_dir: Path | None,
    dtype: torch.dtype,
    device: torch.device,
    text_encoders: Sequence[Path] = (),
    encoders: bool = True,
    vae: bool = False,
    allow_download: bool = False,
) -> Any:
    """Build the family's diffusers pipeline.

    Denoiser, text encoders and VAE are the checkpoint's own; what it lacks comes from
    `pipeline_dir`, then, where downloads are allowed, from the hub. Configurations, tokenizers and
    the scheduler come from `pipeline_dir`, from a diffusers source folder, or from hswq.

    Args:
        checkpoint: open checkpoint.
        detection: what `detect` said of it.
        model_map: the map traced for it; None leaves the denoiser out, for a pipeline that only
            encodes prompts.
        pipeline_dir: diffusers pipeline folder, or None.
        dtype: floating point dtype of all components.
        device: where they are to be.
        text_encoders: files of one text encoder each, used before all others.
        encoders: whether to load text encoders and tokenizers; without, prompts come as embeddings.
        vae: whether to load the VAE; sampling latents needs none.
        allow_download: whether missing components may be fetched.
    Returns:
        The pipeline, silent, its `vae_scale_factor` right with and without VAE.
    Raises:
        InputError: a component is missing or does not fit its configuration or the denoiser.
        FormatError: a file is damaged.
    """
    family = FAMILIES[detection.family]
    sampler = family.sampler
    config, _ = denoiser_config(checkpoint, pipeline_dir, detection)
    loader = ComponentLoader(
        *(checkpoint, pipeline_dir, family.name, sampler.hub),
        *(dtype, device, allow_download),
    )
    parts: dict[str, Any] = {"vae": None, family.component: None}
    with quiet_libraries():
        import diffusers

        kind = getattr(diffusers, sampler.class_name, None)
        if kind is None:
            raise InputError(
                f"the installed diffusers {diffusers.__version__} has no {sampler.class_name}: "
                "install a newer one."
            )
        parts["scheduler"] = loader.scheduler(sampler, detection, config)
        latent_scale = loader.latent_scale()
        files = loader.text_encoder_files(sampler.text_encoders, text_encoders)
        for encoder in sampler.text_encoders:
            parts[encoder.name] = parts[encoder.tokenizer] = None
            if encoders:
                model = loader.text_encoder(encoder, files.get(encoder.name))
                parts[encoder.name] = model
                parts[encoder.tokenizer] = loader.tokenizer(encoder, model)
        if encoders:
            _check_widths(checkpoint, family, parts, config)
        if vae:
            parts["vae"] = loader.vae(sampler)
        if model_map is not None:
            parts[family.component] = load_denoiser(
                checkpoint, model_map, config, dtype, device, family.class_name
            )
        index = loader.configuration("model_index.json")
        pipeline = kind(**parts, **sampler.pipeline_options(index))
    if not vae:
        pipeline.vae_scale_factor = latent_scale
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_widths(
    checkpoint: Checkpoint, family: Family, parts: dict[str, Any], config: dict[str, Any]
) -> None:
    """Refuse text encoders of another model than the denoiser's.

    Raises:
        InputError: what they give is not as wide as what the denoiser reads.
    """
    for name, width in family.sampler.widths(config).items():
        given = [
            getattr(parts[encoder.name].config.get_text_config(), encoder.widths[name])
            for encoder in family.sampler.text_encoders
            if name in encoder.widths
        ]
        if width not in (None, sum(given)):
            raise InputError(
                f"the text encoders give {' + '.join(map(str, given))} channels of {name}, but the "
                f"{family.title} of '{checkpoint.path}' reads {width}: they belong to different "
                "models. Give the folder with its own text encoders, --pipeline DIR."
            )
