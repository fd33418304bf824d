"""Write an SDXL-shaped checkpoint with random weights: full size for benchmarks, tiny for tests.

    python -m benchmarks.make_checkpoint big.safetensors --dtype fp16

Weights are normal with the deviation 1 / sqrt(fan in), so that activations stay of order one. Equal
seeds give equal weights in every layout: a weight's values depend on its component and its place in
that component alone. The UNet is written tensor by tensor; memory is bounded by the second text
encoder.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks import ldm_layout
from hswq.formats.dtypes import DTYPE_NAMES
from hswq.formats.writer import CheckpointWriter, TensorSpec
from hswq.models.folders import SHIPPED
from hswq.models.tokenizer import clip_vocabulary, shipped_tokenizer

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
WIDTHS = ("tiny", "sdxl")
COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "vae")
METADATA = {
    "format": "pt",
    "modelspec.architecture": "stable-diffusion-xl-v1-base",
    "modelspec.title": "random weights",
}
# Three levels as in SDXL, every width a multiple of 16, and text encoders of different widths, by
# which diffusers tells them apart.
TINY_MERGES = ("c a", "ca t</w>", "o f</w>", "p h")
TINY: dict[str, dict[str, Any]] = {
    "unet": {
        "addition_time_embed_dim": 8,
        "attention_head_dim": [1, 2, 3],
        "block_out_channels": [16, 32, 48],
        "cross_attention_dim": 40,
        "norm_num_groups": 8,
        "projection_class_embeddings_input_dim": 72,
        "sample_size": 8,
        "transformer_layers_per_block": [1, 1, 2],
    },
    "text_encoder": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "projection_dim": 16,
        "vocab_size": len(clip_vocabulary(TINY_MERGES)),
    },
    "text_encoder_2": {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "projection_dim": 24,
        "vocab_size": len(clip_vocabulary(TINY_MERGES)),
    },
    "vae": {
        "block_out_channels": [8, 8, 16, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 64,
    },
}
_LDM_STATE: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {
    "unet": ldm_layout.unet_state,
    "text_encoder": ldm_layout.text_encoder_state,
    "text_encoder_2": ldm_layout.open_clip_state,
    "vae": ldm_layout.vae_state,
}


class Noise:
    """Normal numbers without end: one random block, read around and around.

    Its length is prime, so that the rows of a weight do not repeat each other.
    """

    def __init__(self, seed: int, length: int) -> None:
        self._block = torch.randn(length, generator=torch.Generator().manual_seed(seed))
        self._position = 0

    def take(self, count: int) -> Tensor:
        """Return the next `count` numbers, float32 [count]."""
        parts = []
        while count:
            part = self._block[self._position : self._position + count]
            self._position = (self._position + len(part)) % len(self._block)
            count -= len(part)
            parts.append(part)
        return torch.cat(parts)


def random_weights(
    component: str, module: nn.Module, width: str, dtype: torch.dtype, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and random values of every weight of a module, one at a time."""
    length = 16_777_213 if width == "sdxl" else 262_139
    noise = Noise(seed * len(COMPONENTS) + COMPONENTS.index(component), length)
    for name, weight in module.state_dict().items():
        values = noise.take(weight.numel())
        if weight.ndim > 1:
            fan_in = weight.shape[1] if "embedding" in name else math.prod(weight.shape[1:])
            values /= math.sqrt(fan_in)
        else:
            values *= 0.05
            if name.endswith("weight"):
                values += 1
        yield name, values.reshape(weight.shape).to(dtype)


def configuration(component: str, width: str) -> dict[str, Any]:
    """Return the configuration of a component: SDXL's, or narrowed."""
    file = SHIPPED / component / "config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config | TINY[component] if width == "tiny" else config


def meta_module(component: str, width: str) -> nn.Module:
    """Return a component without memory for its weights."""
    config = configuration(component, width)
    with torch.device("meta"):
        if component == "unet":
            return UNet2DConditionModel.from_config(config)
        if component == "vae":
            return AutoencoderKL.from_config(config)
        kind = CLIPTextModel if component == "text_encoder" else CLIPTextModelWithProjection
        return kind(CLIPTextConfig(**config))


def filled_module(component: str, width: str, dtype: torch.dtype, seed: int) -> nn.Module:
    """Return a component with its random weights."""
    module = meta_module(component, width)
    weights = dict(random_weights(component, module, width, dtype, seed))
    module.load_state_dict(weights, assign=True)
    return module


def write_single_file(
    path: Path,
    *,
    width: str = "sdxl",
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    unet_only: bool = False,
    prefix: str = ldm_layout.PREFIXES["unet"],
    v_pred: bool = False,
    zero_snr: bool = False,
) -> None:
    """Write a single file in LDM layout.

    Args:
        path: the file.
        width: 'sdxl' or 'tiny'.
        dtype: dtype of all weights.
        seed: equal seeds, equal weights.
        unet_only: leave out text encoders and VAE.
        prefix: what the UNet's keys start with.
        v_pred: add the marker key of v-prediction, which has no elements.
        zero_snr: add the marker key of a noise schedule that ends in pure noise.
    """
    components = COMPONENTS[:1] if unet_only else COMPONENTS
    prefixes = {**ldm_layout.PREFIXES, "unet": prefix}
    modules = {component: meta_module(component, width) for component in components}
    names = ldm_layout.unet_names(modules["unet"])
    markers = [key for key, wanted in (("v_pred", v_pred), ("ztsnr", zero_snr)) if wanted]
    specs = [TensorSpec(key, "F32", (0,)) for key in markers]
    for component, module in modules.items():
        for name, tensor in _LDM_STATE[component](module).items():
            stored = dtype if tensor.is_floating_point() else tensor.dtype
            key = prefixes[component] + name
            specs.append(TensorSpec(key, DTYPE_NAMES[stored], tuple(tensor.shape)))
    with CheckpointWriter(path, specs, len(json.dumps(METADATA))) as writer:
        for key in markers:
            writer.write(key, b"")
        for name, tensor in random_weights("unet", modules["unet"], width, dtype, seed):
            writer.write(prefix + names[name], tensor)
        for component in components[1:]:
            filled = filled_module(component, width, dtype, seed)
            for name, tensor in _LDM_STATE[component](filled).items():
                stored = tensor.to(dtype) if tensor.is_floating_point() else tensor
                writer.write(prefixes[component] + name, stored)
        writer.commit(METADATA)


def write_folder(
    folder: Path,
    *,
    width: str = "sdxl",
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    components: tuple[str, ...] = COMPONENTS,
    v_pred: bool = False,
    zero_snr: bool = False,
) -> None:
    """Write a diffusers pipeline folder: every configuration, tokenizers, and some weights.

    Args:
        folder: the folder, made where it is missing.
        width: 'sdxl' or 'tiny'.
        dtype: dtype of all weights.
        seed: equal seeds, equal weights.
        components: those whose weights are written.
        v_pred: make the scheduler's prediction type v_prediction.
        zero_snr: make the scheduler's noise schedule end in pure noise.
    """
    scheduler = json.loads((SHIPPED / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    scheduler["prediction_type"] = "v_prediction" if v_pred else "epsilon"
    scheduler["rescale_betas_zero_snr"] = zero_snr
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = json.loads((SHIPPED / "model_index.json").read_text("utf-8"))
    _write_json(folder / "model_index.json", index)
    for name in ("tokenizer", "tokenizer_2"):
        _write_tokenizer(folder / name, width)
    for component in COMPONENTS:
        _write_json(folder / component / "config.json", configuration(component, width))
    for component in components:
        text = component.startswith("text_encoder")
        file = "model.safetensors" if text else "diffusion_pytorch_model.safetensors"
        module = meta_module(component, width)
        keys = {name: _folder_key(name) if text else name for name in module.state_dict()}
        specs = [
            TensorSpec(keys[name], DTYPE_NAMES[dtype], tuple(weight.shape))
            for name, weight in module.state_dict().items()
        ]
        metadata = {"format": "pt"}
        with CheckpointWriter(
            folder / component / file, specs, len(json.dumps(metadata))
        ) as writer:
            for name, tensor in random_weights(component, module, width, dtype, seed):
                writer.write(keys[name], tensor)
            writer.commit(metadata)


def _folder_key(name: str) -> str:
    """The key of a text encoder's weight in the folders on the hub, whatever the version here."""
    if name.startswith(("text_model.", "text_projection.")):
        return name
    return f"text_model.{name}"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(folder: Path, width: str) -> None:
    if width == "sdxl":
        shipped_tokenizer(folder.name).save_pretrained(folder)
        return
    config = json.loads((SHIPPED / folder.name / "tokenizer_config.json").read_text("utf-8"))
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "vocab.json", clip_vocabulary(TINY_MERGES))
    merges = "\n".join(("#version: 0.2", *TINY_MERGES)) + "\n"
    (folder / "merges.txt").write_text(merges, encoding="utf-8")


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="file, or folder with --layout diffusers-folder")
    parser.add_argument("--width", choices=WIDTHS, default="sdxl")
    parser.add_argument("--layout", choices=("ldm", "diffusers-folder"), default="ldm")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unet-only", action="store_true")
    parser.add_argument("--no-prefix", action="store_true", help="ldm: keys as in UNet-only files")
    parser.add_argument("--v-pred", action="store_true")
    parser.add_argument("--zero-snr", action="store_true")
    options = parser.parse_args()
    common = {
        "width": options.width,
        "dtype": DTYPES[options.dtype],
        "seed": options.seed,
        "v_pred": options.v_pred,
        "zero_snr": options.zero_snr,
    }
    if options.layout == "ldm":
        prefix = "" if options.no_prefix else ldm_layout.PREFIXES["unet"]
        write_single_file(options.output, unet_only=options.unet_only, prefix=prefix, **common)
    else:
        components = COMPONENTS[:1] if options.unet_only else COMPONENTS
        write_folder(options.output, components=components, **common)


if __name__ == "__main__":
    main()
