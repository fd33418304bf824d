"""The SDXL pipeline of a checkpoint's own components, for calibration and comparison."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hswq.errors import InputError
from hswq.formats.quantized import is_quantized
from hswq.formats.reader import Checkpoint
from hswq.models.denoiser import denoiser_config, load_denoiser
from hswq.models.family import Detection
from hswq.models.folders import (
    SHIPPED,
    configuration_folders,
    read_json,
    refusing,
)
from hswq.models.map import ModelMap
from hswq.models.quiet import quiet_libraries
from hswq.models.tokenizer import shipped_tokenizer

logger = logging.getLogger(__name__)

# Whose text encoders and VAE are fetched where a checkpoint lacks them and downloads are allowed.
HUB = "stabilityai/stable-diffusion-xl-base-1.0"
_LATENT_SCALE = 8


def build_pipeline(
    checkpoint: Checkpoint,
    detection: Detection,
    model_map: ModelMap,
    *,
    pipeline_dir: Path | None,
    embeddings: bool,
    dtype: torch.dtype,
    device: torch.device,
    allow_download: bool,
    vae: bool = False,
) -> Any:
    """Build a diffusers StableDiffusionXLPipeline from the checkpoint.

    UNet, text encoders and VAE are the checkpoint's own; what it lacks comes from `pipeline_dir`,
    then, where downloads are allowed, from SDXL base on the hub. Configurations, tokenizers and
    the scheduler come from `pipeline_dir`, from a diffusers source folder, or from hswq.

    Args:
        checkpoint: open checkpoint.
        detection: what `detect` said of it; sets the scheduler's prediction type.
        model_map: the map traced for it.
        pipeline_dir: diffusers pipeline folder, or None.
        embeddings: True leaves out text encoders and tokenizers: prompts come as embeddings.
        dtype: floating point dtype of all components.
        device: where they are to be.
        allow_download: whether missing components may be fetched.
        vae: whether to load the VAE; sampling latents needs none.
    Returns:
        The pipeline, silent, its `vae_scale_factor` right with and without VAE.
    Raises:
        InputError: a component is missing or does not fit its configuration.
        FormatError: the checkpoint's file is damaged.
    """
    loader = _ComponentLoader(checkpoint, pipeline_dir, dtype, device, allow_download)
    config, _ = denoiser_config(checkpoint, pipeline_dir, detection)
    parts: dict[str, Any] = dict.fromkeys(
        ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")
    )
    with quiet_libraries():
        from diffusers import AutoencoderKL, StableDiffusionXLPipeline
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        parts["scheduler"] = loader.scheduler(detection)
        latent_scale = loader.latent_scale()
        if not embeddings:
            for suffix, kind, key in (
                ("", CLIPTextModel, "conditioner.embedders.0."),
                ("_2", CLIPTextModelWithProjection, "conditioner.embedders.1."),
            ):
                encoder = loader.load(f"text_encoder{suffix}", kind, key)
                parts[f"text_encoder{suffix}"] = encoder
                parts[f"tokenizer{suffix}"] = loader.tokenizer(f"tokenizer{suffix}", encoder)
            _check_widths(checkpoint, parts, config)
        if vae:
            parts["vae"] = loader.load("vae", AutoencoderKL, "first_stage_model.")
        index = loader.configuration("model_index.json")
        pipeline = StableDiffusionXLPipeline(
            **parts,
            unet=load_denoiser(checkpoint, model_map, config, dtype, device),
            force_zeros_for_empty_prompt=index.get("force_zeros_for_empty_prompt", True),
            add_watermarker=False,
        )
    if not vae:
        pipeline.vae_scale_factor = latent_scale
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_widths(checkpoint: Checkpoint, parts: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuse text encoders of another model than the UNet's.

    Raises:
        InputError: what they give is not as wide as what the UNet's cross-attention reads.
    """
    widths = [parts[name].config.hidden_size for name in ("text_encoder", "text_encoder_2")]
    if sum(widths) != config.get("cross_attention_dim"):
        raise InputError(
            f"the text encoders give {widths[0]} + {widths[1]} channels, but the UNet of "
            f"'{checkpoint.path}' reads {config.get('cross_attention_dim')}: they belong to "
            "different models. Give the folder with its own text encoders, --pipeline DIR."
        )


@dataclass(frozen=True)
class _ComponentLoader:
    """Where components and configurations come from, in order."""

    checkpoint: Checkpoint
    pipeline_dir: Path | None
    dtype: torch.dtype
    device: torch.device
    allow_download: bool

    def configuration(self, path: str) -> dict[str, Any]:
        """Read a JSON file of the first folder that has it; hswq ships all of them."""
        return read_json(self._folder_with(path) / path) or {}

    def latent_scale(self) -> int:
        """Return how many pixels an edge of a latent's element covers.

        Raises:
            InputError: the VAE's configuration does not tell.
        """
        path = "vae/config.json"
        levels = self.configuration(path).get("block_out_channels")
        if levels is None:
            return _LATENT_SCALE
        if not isinstance(levels, list) or not levels:
            raise InputError(
                f"'{self._folder_with(path) / path}' has block_out_channels {levels!r}; a list of "
                "one width a level is needed: give another folder with --pipeline DIR."
            )
        factor: int = 2 ** (len(levels) - 1)
        return factor

    def scheduler(self, detection: Detection) -> Any:
        """Return the sampler's scheduler, tried out.

        Raises:
            InputError: its configuration cannot be used.
        """
        from diffusers import EulerDiscreteScheduler

        # A file that says nothing is of the type that the configuration names.
        overrides: dict[str, Any] = {}
        if detection.prediction_type == "v_prediction":
            overrides["prediction_type"] = "v_prediction"
        if detection.zero_terminal_snr:
            # Only this spacing starts from the last timestep, the one of pure noise.
            overrides |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        path = "scheduler/scheduler_config.json"
        config = self.configuration(path)
        with refusing(
            f"the scheduler in '{self._folder_with(path) / path}' cannot be used",
            "Get that file again, or give another folder with --pipeline DIR.",
        ):
            # Most entries are read only when it runs, and by then the checkpoint has been loaded.
            trial = EulerDiscreteScheduler.from_config(config, **overrides)
            trial.set_timesteps(2)
            latents = torch.zeros(1, 1, 1, 1)
            trial.step(
                trial.scale_model_input(latents, trial.timesteps[0]), trial.timesteps[0], latents
            )
            if not bool(torch.isfinite(trial.sigmas).all()):
                raise ValueError("its noise levels hold NaN or Inf")
            return EulerDiscreteScheduler.from_config(config, **overrides)

    def tokenizer(self, name: str, encoder: Any) -> Any:
        """Return the tokenizer `name`, checked against the text encoder it feeds.

        Raises:
            InputError: it cannot be loaded, or gives tokens or lengths that the text encoder does
                not know.
        """
        from transformers import CLIPTokenizer

        folder = self._folder_with(f"{name}/vocab.json", f"{name}/tokenizer.json")
        if folder == SHIPPED:
            tokenizer = shipped_tokenizer(name)
        else:
            with refusing(
                f"the tokenizer in '{folder / name}' cannot be loaded",
                "Get its vocab.json, merges.txt and tokenizer_config.json again, or give another "
                "folder with --pipeline DIR.",
            ):
                tokenizer = CLIPTokenizer.from_pretrained(folder / name, local_files_only=True)
        known = encoder.config.vocab_size
        if len(tokenizer) > known:
            raise InputError(
                f"'{folder / name}' has {len(tokenizer)} tokens, but the text encoder of "
                f"'{self.checkpoint.path}' knows {known}: give the folder with its own tokenizers, "
                "--pipeline DIR."
            )
        length, longest = tokenizer.model_max_length, encoder.config.max_position_embeddings
        if not isinstance(length, int) or not 0 < length <= longest:
            raise InputError(
                f"'{folder / name}' gives {length!r} tokens a prompt (model_max_length in its "
                f"tokenizer_config.json), and the text encoder of '{self.checkpoint.path}' takes 1 "
                f"to {longest}: give the folder with its own tokenizers, --pipeline DIR."
            )
        return tokenizer

    def load(self, name: str, kind: Any, prefix: str) -> nn.Module:
        """Load one component: the checkpoint's own, that of --pipeline, or the hub's.

        Args:
            name: component, as its subfolder in a diffusers pipeline is named.
            kind: its class.
            prefix: what its keys start with in a single file.
        Raises:
            InputError: it is nowhere to be had, quantized, or incomplete.
        """
        keys = [key for key in self.checkpoint.tensors if key.startswith(prefix)]
        if keys:
            found = is_quantized(self.checkpoint, prefix)
            if found is not None:
                raise InputError(
                    f"the {name} of '{self.checkpoint.path}' is quantized ({found}) and cannot be "
                    "sampled: give a checkpoint whose other components have 16 or 32 bits, or "
                    "prompt embeddings with --embeddings FILE."
                )
            return self._finish(self._from_single_file(name, kind, keys))
        for folder in (self.checkpoint.pipeline_dir, self.pipeline_dir):
            if folder is not None and any((folder / name).glob("*.safetensors")):
                return self._finish(_from_folder(folder / name, kind))
        if self.allow_download:
            logger.warning("%s has no %s; that of %s is used", self.checkpoint.path, name, HUB)
            return self._finish(_from_pretrained(kind, HUB, subfolder=name))
        cure = "" if name == "vae" else ", or prompt embeddings with --embeddings FILE"
        raise InputError(
            f"'{self.checkpoint.path}' holds no {name}, and no folder that does was given: give a "
            f"diffusers pipeline folder with its weights, --pipeline DIR{cure}."
        )

    def _folder_with(self, *paths: str) -> Path:
        """Return the first folder that has one of the files; hswq's own where none has."""
        for folder in configuration_folders(self.checkpoint, self.pipeline_dir):
            if any((folder / path).is_file() for path in paths):
                return folder
        return SHIPPED

    def _from_single_file(self, name: str, kind: Any, keys: list[str]) -> nn.Module:
        from diffusers import AutoencoderKL
        from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

        folder = self._folder_with(f"{name}/config.json")
        arguments = {
            "config": str(folder),
            "subfolder": name,
            "torch_dtype": self.dtype,
            "local_files_only": True,
        }
        state = {key: self.checkpoint.read(key) for key in keys}
        with refusing(
            f"the {name} of '{self.checkpoint.path}' does not fit the configuration in "
            f"'{folder / name}'",
            "Give the folder with its own configuration, --pipeline DIR.",
        ):
            if kind is AutoencoderKL:
                model: nn.Module = kind.from_single_file(state, **arguments)
            else:
                model = create_diffusers_clip_model_from_ldm(kind, state, **arguments)
        missing = [key for key, value in model.state_dict().items() if value.is_meta]
        if missing:
            raise _incomplete(f"the {name} of '{self.checkpoint.path}'", missing)
        return model

    def _finish(self, model: nn.Module) -> nn.Module:
        return model.to(device=self.device, dtype=self.dtype).requires_grad_(False).eval()


def _from_folder(folder: Path, kind: Any) -> nn.Module:
    plain = any(".fp16" not in file.name for file in folder.glob("*.safetensors"))
    variant = None if plain else "fp16"
    return _from_pretrained(kind, folder, variant=variant, local_files_only=True)


def _from_pretrained(kind: Any, source: Path | str, **arguments: Any) -> nn.Module:
    """Load a component of a folder or the hub; never a pickle, and never with weights missing.

    Raises:
        InputError: it cannot be loaded, or lacks weights.
    """
    with refusing(
        f"the {kind.__name__} of '{source}' cannot be loaded",
        "Get its files again, or give another folder with --pipeline DIR.",
    ):
        model: nn.Module
        model, report = kind.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, **arguments
        )
    if report["missing_keys"]:
        raise _incomplete(f"'{source}'", sorted(report["missing_keys"]))
    return model


def _incomplete(where: str, missing: list[str]) -> InputError:
    return InputError(
        f"{where} lacks {len(missing)} weights, first {', '.join(map(repr, missing[:10]))}: "
        "the file is damaged, or made for another configuration."
    )
