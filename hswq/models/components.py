"""Text encoders, tokenizers, scheduler and VAE of a pipeline: where they come from, in order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hswq.errors import InputError
from hswq.formats.quantized import container_keys, dequantize, quantized_weights
from hswq.formats.reader import Checkpoint
from hswq.models.family import Detection
from hswq.models.folders import SHIPPED, configuration_folders, read_json, refusing
from hswq.models.sampler import Sampler, TextEncoder
from hswq.models.tokenizer import shipped_tokenizer

logger = logging.getLogger(__name__)

_LATENT_SCALE = 8


@dataclass(frozen=True)
class ComponentLoader:
    """Where components and configurations come from, in order.

    Attributes:
        checkpoint: the open checkpoint, whose own components go first.
        pipeline_dir: the folder of --pipeline, or None.
        family: name of the family, whose configurations hswq ships.
        hub: repository of last resort, where downloads are allowed.
        dtype: floating point dtype of the components.
        device: where they are to be.
        allow_download: whether the repository may be asked.
    """

    checkpoint: Checkpoint
    pipeline_dir: Path | None
    family: str
    hub: str
    dtype: torch.dtype
    device: torch.device
    allow_download: bool

    def configuration(self, path: str) -> dict[str, Any]:
        """Read a JSON file of the first folder that has it; empty where none has."""
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

    def scheduler(self, sampler: Sampler, detection: Detection, config: dict[str, Any]) -> Any:
        """Return the sampler's scheduler, tried out.

        Args:
            sampler: tells its class.
            detection: what `detect` said of the checkpoint.
            config: of the denoiser.
        Raises:
            InputError: its configuration cannot be used.
        """
        import diffusers

        kind = getattr(diffusers, sampler.scheduler)
        path = "scheduler/scheduler_config.json"
        folder, entries = self._folder_with(path), self.configuration(path)
        overrides = sampler.scheduler_overrides(detection, config, folder == self._shipped)
        with refusing(
            f"the scheduler in '{folder / path}' cannot be used",
            "Get that file again, or give another folder with --pipeline DIR.",
        ):
            # Most entries are read only when it runs, and by then the checkpoint has been loaded.
            trial = kind.from_config(entries, **overrides)
            shifted = trial.config.get("use_dynamic_shifting")
            trial.set_timesteps(2, **({"mu": 1.0} if shifted else {}))
            latents = torch.zeros(1, 1, 1, 1)
            if hasattr(trial, "scale_model_input"):
                trial.scale_model_input(latents, trial.timesteps[0])
            trial.step(latents, trial.timesteps[0], latents)
            if not bool(torch.isfinite(trial.sigmas).all()):
                raise ValueError("its noise levels hold NaN or Inf")
            return kind.from_config(entries, **overrides)

    def tokenizer(self, encoder: TextEncoder, model: Any) -> Any:
        """Return the tokenizer of a text encoder, checked against it.

        Raises:
            InputError: it is missing, cannot be loaded, or gives tokens or lengths that the text
                encoder does not know.
        """
        name = encoder.tokenizer
        tokenizer, where = self._find_tokenizer(name, encoder.fixed_length)
        config = model.config.get_text_config()
        if len(tokenizer) > config.vocab_size:
            raise InputError(
                f"{where} has {len(tokenizer)} tokens, but the {encoder.name} of "
                f"'{self.checkpoint.path}' knows {config.vocab_size}: give the folder with its own "
                "tokenizers, --pipeline DIR."
            )
        lacking = sorted(set(encoder.tokens) - set(tokenizer.get_vocab()))
        if lacking:
            raise InputError(
                f"{where} has no token {lacking[0]!r}, which every tokenizer of a "
                f"{encoder.class_name} has: it is of another text encoder. Give the folder with "
                "the model's own tokenizers, --pipeline DIR."
            )
        if encoder.fixed_length:
            length, longest = tokenizer.model_max_length, config.max_position_embeddings
            if not isinstance(length, int) or not 0 < length <= longest:
                raise InputError(
                    f"{where} gives {length!r} tokens a prompt (model_max_length in its "
                    f"tokenizer_config.json), and the {encoder.name} of '{self.checkpoint.path}' "
                    f"takes 1 to {longest}: give the folder with its own tokenizers, "
                    "--pipeline DIR."
                )
        return tokenizer

    def text_encoder_files(
        self, encoders: Sequence[TextEncoder], paths: Sequence[Path]
    ) -> dict[str, Path]:
        """Tell which text encoder each file holds.

        Args:
            encoders: those of the family.
            paths: files of one text encoder each, in the names of transformers, without prefix.
        Returns:
            The files by the encoders' names.
        Raises:
            InputError: a file holds none of them, or two hold the same.
            FormatError: a file is damaged.
        """
        found: dict[str, Path] = {}
        for path in paths:
            with Checkpoint.open(path) as file:
                fitting = [encoder for encoder in encoders if self._is_encoder(file, encoder)]
            if not fitting:
                needed = ", ".join(
                    f"{encoder.name} ({encoder.class_name}, {self._width(encoder) or 'any'} "
                    "channels)"
                    for encoder in encoders
                )
                raise InputError(
                    f"'{path}' is no text encoder of this family, which needs {needed}: give its "
                    "own with --text-encoder FILE."
                )
            name = fitting[0].name
            if name in found:
                raise InputError(
                    f"'{found[name]}' and '{path}' both hold the {name}: give one of them."
                )
            found[name] = path
        return found

    def text_encoder(self, encoder: TextEncoder, file: Path | None) -> nn.Module:
        """Load a text encoder: from its own file, the checkpoint, a folder or the hub.

        Raises:
            InputError: it is nowhere to be had, quantized beyond reading, or incomplete.
            FormatError: a file is damaged.
        """
        import transformers

        kind = getattr(transformers, encoder.class_name)
        if file is not None:
            with Checkpoint.open(file) as opened:
                return self._from_file(opened, encoder, kind, "")
        if any(key.startswith(encoder.prefix) for key in self.checkpoint.tensors):
            return self._from_file(self.checkpoint, encoder, kind, encoder.prefix)
        return self._from_elsewhere(
            encoder.name,
            kind,
            ", its file, --text-encoder FILE, or prompt embeddings with --embeddings FILE",
        )

    def vae(self, sampler: Sampler) -> nn.Module:
        """Load the VAE: the checkpoint's own, a folder's or the hub's.

        Raises:
            InputError: it is nowhere to be had, or incomplete.
            FormatError: the checkpoint's file is damaged.
        """
        import diffusers

        kind = getattr(diffusers, sampler.vae)
        prefix = sampler.vae_prefix
        # diffusers finds the VAE by the keys of full checkpoints.
        state = {
            "first_stage_model." + key: tensor
            for key, tensor in _read_state(self.checkpoint, prefix).items()
        }
        if not state:
            return self._from_elsewhere("vae", kind, "")
        with self._fitting("vae"):
            model: nn.Module = kind.from_single_file(state, **self._single_file("vae"))
        return self._finish(_complete(model, f"the vae of '{self.checkpoint.path}'"))

    @property
    def _shipped(self) -> Path:
        return configuration_folders(self.checkpoint, None, self.family)[-1]

    def _folder_with(self, *paths: str) -> Path:
        """Return the first folder that has one of the files; hswq's own where none has."""
        for folder in configuration_folders(self.checkpoint, self.pipeline_dir, self.family):
            if any((folder / path).is_file() for path in paths):
                return folder
        return self._shipped

    def _find_tokenizer(self, name: str, clip: bool) -> tuple[Any, str]:
        """Return a tokenizer, and in words where it comes from."""
        from transformers import AutoTokenizer, CLIPTokenizer

        files = ("vocab.json", "tokenizer.json", "spiece.model")
        folder = self._folder_with(*(f"{name}/{file}" for file in files))
        if not any((folder / name / file).is_file() for file in files):
            if clip:
                # hswq ships CLIP's vocabulary, once for all families.
                return shipped_tokenizer(name), f"'{SHIPPED / name}'"
            if not self.allow_download:
                raise InputError(
                    f"no tokenizer {name!r} was found, which sampling '{self.checkpoint.path}' "
                    "needs: give a diffusers pipeline folder that has it, --pipeline DIR, or "
                    "prompt embeddings with --embeddings FILE."
                )
        where = f"'{folder / name}'"
        kind = CLIPTokenizer if clip else AutoTokenizer
        arguments: dict[str, Any] = {"local_files_only": True}
        source: Path | str = folder / name
        if not (folder / name).is_dir():
            where = f"'{self.hub}/{name}'"
            source, arguments = self.hub, {"subfolder": name}
        with refusing(
            f"the tokenizer in {where} cannot be loaded",
            "Get its files (tokenizer.json, or vocab.json and merges.txt, with "
            "tokenizer_config.json) again, or give another folder with --pipeline DIR.",
        ):
            # Code that comes with a tokenizer is never run, and never asked about.
            return kind.from_pretrained(source, trust_remote_code=False, **arguments), where

    def _width(self, encoder: TextEncoder) -> int | None:
        """Channels of a text encoder, as its configuration says; None where there is none."""
        config = self.configuration(f"{encoder.name}/config.json")
        entry = next(iter(encoder.widths.values()))
        width = config.get(entry, config.get("text_config", {}).get(entry))
        return width if isinstance(width, int) else None

    def _is_encoder(self, file: Checkpoint, encoder: TextEncoder) -> bool:
        if not set(encoder.signature) <= file.tensors.keys():
            return False
        width = self._width(encoder)
        return width is None or file.tensors[encoder.signature[0]].shape[-1] == width

    def _from_file(
        self, checkpoint: Checkpoint, encoder: TextEncoder, kind: Any, prefix: str
    ) -> nn.Module:
        from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

        where = f"the {encoder.name} of '{checkpoint.path}'"
        path = f"{encoder.name}/config.json"
        folder = self._folder_with(path)
        config = read_json(folder / path)
        if config is None:
            raise InputError(
                f"{where} has no configuration: give the diffusers pipeline folder that has "
                f"'{path}', --pipeline DIR."
            )
        state = _read_state(checkpoint, prefix)
        with self._fitting(encoder.name, checkpoint):
            if encoder.signature[0] in state:
                model, report = kind.from_pretrained(
                    None,
                    config=kind.config_class.from_dict(config),
                    state_dict={key: self._cast(tensor) for key, tensor in state.items()},
                    torch_dtype=self.dtype,
                    output_loading_info=True,
                )
                missing = sorted(report["missing_keys"])
            else:
                named = {prefix + key: self._cast(tensor) for key, tensor in state.items()}
                model = create_diffusers_clip_model_from_ldm(
                    kind, named, **self._single_file(encoder.name)
                )
                missing = []
        if missing:
            raise _incomplete(where, missing)
        return self._finish(_complete(model, where))

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _single_file(self, name: str) -> dict[str, Any]:
        return {
            "config": str(self._folder_with(f"{name}/config.json")),
            "subfolder": name,
            "torch_dtype": self.dtype,
            "local_files_only": True,
        }

    def _fitting(self, name: str, checkpoint: Checkpoint | None = None) -> Any:
        folder = self._folder_with(f"{name}/config.json")
        return refusing(
            f"the {name} of '{(checkpoint or self.checkpoint).path}' does not fit the "
            f"configuration in '{folder / name}'",
            "Give the folder with its own configuration, --pipeline DIR.",
        )

    def _from_elsewhere(self, name: str, kind: Any, cures: str) -> nn.Module:
        for folder in (self.checkpoint.pipeline_dir, self.pipeline_dir):
            if folder is not None and any((folder / name).glob("*.safetensors")):
                return self._finish(_from_folder(folder / name, kind))
        if self.allow_download:
            logger.warning("%s has no %s; that of %s is used", self.checkpoint.path, name, self.hub)
            return self._finish(_from_pretrained(kind, self.hub, subfolder=name))
        raise InputError(
            f"'{self.checkpoint.path}' holds no {name}, and no folder that does was given: give a "
            f"diffusers pipeline folder with its weights, --pipeline DIR{cures}."
        )

    def _finish(self, model: nn.Module) -> nn.Module:
        return model.to(device=self.device, dtype=self.dtype).requires_grad_(False).eval()


def _read_state(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    """Read a component's tensors, FP8 weights dequantized, by their keys without prefix.

    Raises:
        FormatError: a weight is quantized in a way that cannot be read.
    """
    quantized = {weight.weight_key: base for base, weight in quantized_weights(checkpoint).items()}
    extra = container_keys(checkpoint)
    return {
        key.removeprefix(prefix): (
            dequantize(checkpoint, quantized[key]) if key in quantized else checkpoint.read(key)
        )
        for key in checkpoint.tensors
        if key.startswith(prefix) and key not in extra
    }


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


def _complete(model: nn.Module, where: str) -> nn.Module:
    missing = [key for key, value in model.state_dict().items() if value.is_meta]
    if missing:
        raise _incomplete(where, missing)
    return model


def _incomplete(where: str, missing: list[str]) -> InputError:
    return InputError(
        f"{where} lacks {len(missing)} weights, first {', '.join(map(repr, missing[:10]))}: "
        "the file is damaged, or made for another configuration."
    )
