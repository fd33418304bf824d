"""Train small transformers of Flux.1's and Z-Image's shape on the demo model's world.

    python -m benchmarks.demo_model.transformers flux --folder DIR --steps 600

They paint the demo model's scenes in the latents of its VAE, from the embeddings of its text
encoders, which stay as they are. Flow matching: x_s = (1 - s) x_0 + s e, and the network learns
e - x_0 from x_s and s. Out come `model.safetensors` (float16 or bfloat16, layout of single files),
a pipeline folder with the VAE, and `embeddings.safetensors`, those of the demo's prompts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.demo_model.load import demo_pipeline
from benchmarks.demo_model.shapes import describe
from benchmarks.demo_model.train import Training, draw_batch, training_scenes
from benchmarks.make_transformer import flux_shapes, z_image_shapes
from hswq.calibration import encode_prompts, save_embeddings
from hswq.driver.demo import demo_folder
from hswq.formats.reader import Checkpoint
from hswq.models.denoiser import denoiser_config, meta_denoiser
from hswq.models.detect import detect
from hswq.models.families import FAMILIES
from hswq.models.trace import trace_map

TEXT, POOLED, CHANNELS = 64, 40, 4
SHAPES = {
    "flux": flux_shapes(
        width=192, head=32, double=3, single=6, text=TEXT, pooled=POOLED, inputs=4 * CHANNELS
    ),
    "z-image": z_image_shapes(
        width=192, head=32, layers=8, refiners=1, text=TEXT, inputs=4 * CHANNELS
    ),
}
DTYPES = {"flux": torch.float16, "z-image": torch.bfloat16}
# Flux.1-dev was distilled with its guidance scale as an input.
GUIDANCE = 3.5


def encode(pipeline: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return the embeddings of texts, [B, T, C], and the pooled ones, [B, P]."""
    context, _, pooled, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False)
    return context, pooled


def flux_velocity(model: nn.Module, latents: Tensor, sigma: Tensor, texts: Any) -> Tensor:
    """Return what a Flux transformer predicts for [B, C, H, W]."""
    context, pooled = texts
    count, channels, height, width = latents.shape
    halves = latents.reshape(count, channels, height // 2, 2, width // 2, 2)
    tokens = halves.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, 4 * channels)
    rows = torch.arange(height // 2)[:, None].expand(height // 2, width // 2)
    columns = torch.arange(width // 2).expand(height // 2, width // 2)
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    predicted = model(
        hidden_states=tokens,
        timestep=sigma,
        guidance=torch.full((count,), GUIDANCE),
        pooled_projections=pooled,
        encoder_hidden_states=context,
        txt_ids=torch.zeros(context.shape[1], 3),
        img_ids=places.float(),
        return_dict=False,
    )[0]
    split = predicted.reshape(count, height // 2, width // 2, channels, 2, 2)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)


def z_image_velocity(model: nn.Module, latents: Tensor, sigma: Tensor, texts: Any) -> Tensor:
    """Return what a Z-Image transformer, which counts time backwards, predicts."""
    frames = list(latents.unsqueeze(2).unbind(0))
    predicted = model(frames, 1 - sigma, list(texts[0].unbind(0)), return_dict=False)[0]
    return -torch.stack(list(predicted)).squeeze(2)


VELOCITY: dict[str, Callable[[nn.Module, Tensor, Tensor, Any], Tensor]] = {
    "flux": flux_velocity,
    "z-image": z_image_velocity,
}


def skeleton(family: str, path: Path) -> None:
    """Write a checkpoint of the right keys and shapes, all zeros."""
    dtype = DTYPES[family]
    zeros = {key: torch.zeros(shape, dtype=dtype) for key, shape in SHAPES[family].items()}
    save_file(zeros, path)


def write_model(family: str, model: nn.Module, path: Path) -> None:
    """Write a trained transformer in the layout of single files, by the traced map."""
    skeleton(family, path)
    state = model.state_dict()
    with Checkpoint.open(path) as checkpoint:
        model_map = trace_map(checkpoint, detect(checkpoint))
        tensors = {key: checkpoint.read(key) for key in checkpoint.tensors}
    for name, sources in model_map.sources.items():
        row = 0
        for part in sources:
            count = part.stop - part.start
            tensors[part.key][part.start : part.stop] = state[name][row : row + count]
            row += count
    save_file(tensors, path)


def write_folder(family: str, folder: Path, pipeline: Any) -> None:
    """Write what the family's pipeline needs beside the transformer: index, scheduler and VAE."""
    sampler = FAMILIES[family].sampler
    index = {"_class_name": sampler.class_name}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    # Pipelines of this kind subtract a shift, which the demo's VAE does not know of.
    pipeline.vae.register_to_config(shift_factor=0.0)
    pipeline.vae.save_pretrained(folder / "vae")


def encode_images(pipeline: Any, count: int, seed: int) -> tuple[Tensor, list[Any]]:
    """Return scaled latents of drawn scenes, and the scenes."""
    rng = np.random.default_rng(seed)
    scenes = training_scenes()
    chosen = [scenes[index] for index in rng.integers(len(scenes), size=count)]
    latents = []
    with torch.no_grad():
        for first in tqdm(range(0, count, 64), desc="encode"):
            part = chosen[first : first + 64]
            images = draw_batch(part, rng, np.zeros(len(part), bool))
            mean = pipeline.vae.encode(images).latent_dist.mean
            latents.append(mean * pipeline.vae.config.scaling_factor)
    return torch.cat(latents), chosen


def train(arguments: argparse.Namespace) -> nn.Module:
    """Train a transformer and return its moving average."""
    family, folder = arguments.family, arguments.folder
    pipeline = demo_pipeline()
    skeleton(family, folder / "model.safetensors")
    with Checkpoint.open(folder / "model.safetensors") as checkpoint:
        detection = detect(checkpoint)
        config, _ = denoiser_config(checkpoint, None, detection)
    torch.manual_seed(arguments.seed)
    model = meta_denoiser(config, FAMILIES[family].class_name)
    kind: Any = type(model)
    model = kind.from_config(config).train()
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters")
    for name, weight in model.named_parameters():
        if name.endswith("pad_token"):
            nn.init.normal_(weight, std=0.02)
    write_folder(family, folder, pipeline)
    latents, scenes = encode_images(pipeline, arguments.images, arguments.seed)
    whole = nn.ModuleDict({"transformer": model})
    training = Training(whole, arguments, folder / "state.pt", decay=0.99)

    def loss_of(rng: np.random.Generator) -> Tensor:
        batch = rng.integers(arguments.images, size=arguments.batch)
        with torch.no_grad():
            texts = encode(pipeline, [describe(scenes[index], rng) for index in batch])
        exact = latents[batch]
        noise = torch.randn_like(exact)
        # More of the middle, as these families were trained, and of the noisy end.
        sigma = torch.sigmoid(torch.randn(arguments.batch) + 0.5)
        noisy = exact.lerp(noise, sigma[:, None, None, None])
        predicted = VELOCITY[family](model, noisy, sigma, texts)
        return (predicted - (noise - exact)).square().mean()

    training.run(loss_of)
    prompts = (demo_folder() / "prompts.txt").read_text(encoding="utf-8").splitlines()

    def encode_one(prompt: str) -> dict[str, Tensor]:
        context, pooled = encode(pipeline, [prompt])
        named = {"prompt_embeds": context, "pooled_prompt_embeds": pooled}
        return {name: named[name] for name in FAMILIES[family].sampler.embeddings(0.0)}

    with torch.no_grad():
        embeddings = encode_prompts(prompts, encode_one, "", lambda _: None)
    save_embeddings(folder / "embeddings.safetensors", embeddings)
    trained: nn.Module = training.average.module["transformer"]
    return trained


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=tuple(SHAPES))
    parser.add_argument("--folder", type=Path, required=True, help="working folder, and the result")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--images", type=int, default=4096, help="encoded for training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_model(arguments.family, train(arguments), arguments.folder / "model.safetensors")


if __name__ == "__main__":
    main()
