"""Train the demo model; both stages resume where they stopped.

    python -m benchmarks.demo_model.train vae --folder DIR --steps 1500
    python -m benchmarks.demo_model.train denoiser --folder DIR --steps 3000
    python -m benchmarks.demo_model.export --folder DIR

The autoencoder learns to reproduce drawn scenes; its latents are then normalized. The denoiser
(UNet and both text encoders together) learns to predict the noise in latents of captioned scenes;
in a folder without autoencoder it takes the shipped one's.
One caption in ten is dropped, half of these for the empty prompt and half for SDXL's zeroed
embeddings, so that classifier-free guidance works with either. One image in ten is drawn at half
the resolution, which the time ids tell, so that SDXL's size conditioning means something.

The shipped weights had 1,500 autoencoder steps in two legs and 3,000 denoiser steps, of which the
first 1,500 drew timesteps evenly, without the noise offset and the weighting of the loss.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import CLIPTokenizer

from benchmarks.demo_model import architecture
from benchmarks.demo_model.load import demo_pipeline
from benchmarks.demo_model.shapes import (
    RESOLUTION,
    TOKEN_COUNT,
    Scene,
    all_scenes,
    demo_scenes,
    describe,
    draw,
    draw_collage,
    write_tokenizer,
)

HALF = RESOLUTION // 2
NOISE_OFFSET = 0.3


class Training:
    """One stage: its optimizer, learning rate schedule, moving average and saved state."""

    def __init__(
        self, model: nn.Module, arguments: argparse.Namespace, state: Path, decay: float
    ) -> None:
        self.model, self.steps, self.state, self.step = model, arguments.steps, state, 0
        self.seed = arguments.seed
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        # Ten narrow layers of text encoder bear less than the UNet.
        rates = {"text_encoder": 0.3, "text_encoder_2": 0.3}
        self.optimizer = torch.optim.AdamW(
            [
                {"params": child.parameters(), "lr": arguments.learning_rate * rates.get(name, 1.0)}
                for name, child in model.named_children()
            ],
            betas=(0.9, 0.99),
            weight_decay=0.01,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min(1, step / 50) * (1 + math.cos(math.pi * step / self.steps)) / 2,
        )
        self.parts = {
            "model": self.model,
            "average": self.average,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        }
        if state.exists():
            saved = torch.load(state, weights_only=True)
            self.step = saved["step"]
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])

    def save(self) -> None:
        """Replace the saved state by this one."""
        saved: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
        partial = self.state.with_suffix(".partial")
        torch.save(saved | {"step": self.step}, partial)
        partial.replace(self.state)

    def run(self, loss_of: Any, save_every: int = 250) -> None:
        """Train to the last step on `loss_of(rng)`; seed and step decide all random numbers."""
        progress = tqdm(
            range(self.step, self.steps), initial=self.step, total=self.steps, mininterval=5
        )
        running = None
        for step in progress:
            torch.manual_seed(self.seed * 1_000_000 + step)
            loss = loss_of(np.random.default_rng(self.seed * 1_000_000 + step))
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.average.update_parameters(self.model)
            running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
            progress.set_postfix(loss=f"{running:.4f}", refresh=False)
            self.step = step + 1
            if self.step % save_every == 0 or self.step == self.steps:
                self.save()


def draw_batch(
    scenes: list[Scene], rng: np.random.Generator, half: np.ndarray, resolution: int = RESOLUTION
) -> Tensor:
    """Images of scenes as float32 [B, 3, H, W] in [-1, 1], those of `half` drawn at H/2, W/2."""
    images = []
    for scene, coarse in zip(scenes, half, strict=True):
        pixels = torch.from_numpy(draw(scene, rng, resolution // 2 if coarse else resolution))
        pixels = pixels.permute(2, 0, 1)[None]
        if coarse:
            pixels = functional.interpolate(pixels, resolution, mode="bilinear")
        images.append(pixels)
    return torch.cat(images) * 2 - 1


def training_scenes() -> list[Scene]:
    """All scenes but the shipped prompts'."""
    held_out = set(demo_scenes())
    return [scene for scene in all_scenes() if scene not in held_out]


def normalize_latents(vae: nn.Module, images: Tensor) -> None:
    """Give each latent channel mean 0 and, after the scaling factor, variance 1 on `images`.

    The affine map and its inverse fold into the two 1x1 convolutions around the latents.
    """
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        gain = 1 / (std * vae.config.scaling_factor)
        weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
        weight[:4] *= gain[:, None, None, None]
        bias[:4] = (bias[:4] - mean) * gain
        bias[4:] += 2 * gain.log()
        after = vae.post_quant_conv
        after.bias += after.weight[:, :, 0, 0] @ mean
        after.weight /= gain[None, :, None, None]


def train_vae(arguments: argparse.Namespace) -> None:
    """Train the autoencoder and write vae.pt."""
    torch.manual_seed(arguments.seed)
    vae = architecture.build_vae()
    # The noise of the posterior starts small: at its usual 1 it drowns the untrained latents.
    nn.init.constant_(vae.quant_conv.bias[4:], -6)
    training = Training(vae, arguments, arguments.folder / "vae_state.pt", decay=0.99)
    scenes = training_scenes()

    def loss_of(rng: np.random.Generator) -> Tensor:
        # Half scenes, half collages, which show more colours and edges; small ones first: they
        # teach the same at a quarter of the cost.
        resolution = HALF if training.step < 0.75 * arguments.steps else RESOLUTION
        count = arguments.batch // 2
        chosen = [scenes[index] for index in rng.choice(len(scenes), count)]
        drawn = draw_batch(chosen, rng, rng.random(count) < 0.1, resolution)
        collages = np.stack([draw_collage(rng, resolution) for _ in range(count)])
        images = torch.cat([drawn, torch.from_numpy(collages).permute(0, 3, 1, 2) * 2 - 1])
        posterior = vae.encode(images).latent_dist
        painted = vae.decode(posterior.sample()).sample
        error = functional.mse_loss(painted, images) + 0.3 * functional.l1_loss(painted, images)
        return error + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    training.run(loss_of)
    trained = training.average.module.eval()
    rng = np.random.default_rng(arguments.seed)
    chosen = [scenes[index] for index in rng.choice(len(scenes), 256)]
    images = draw_batch(chosen, rng, np.zeros(256, bool))
    normalize_latents(trained, images)
    with torch.no_grad():
        latents = trained.encode(images[:64]).latent_dist.mean
        painted = trained.decode(latents).sample
    tqdm.write(
        f"latents: mean {latents.mean() * trained.config.scaling_factor:.3f}, "
        f"std {latents.std() * trained.config.scaling_factor:.3f}; "
        f"reconstruction: {10 * math.log10(4 / functional.mse_loss(painted, images[:64])):.1f} dB"
    )
    torch.save(trained.state_dict(), arguments.folder / "vae.pt")


def encode_scenes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Scaled latents of drawn scenes, cached; the scenes, and which were drawn coarsely."""
    rng = np.random.default_rng(arguments.seed)
    scenes = training_scenes()
    chosen = [scenes[index] for index in rng.integers(len(scenes), size=arguments.images)]
    half = rng.random(arguments.images) < 0.1
    cache = arguments.folder / "latents.pt"
    if cache.exists():
        latents = torch.load(cache, weights_only=True)
        return {"latents": latents, "scenes": chosen, "half": half}
    vae = architecture.build_vae().eval()
    trained = arguments.folder / "vae.pt"
    if not trained.exists():
        torch.save(demo_pipeline().vae.state_dict(), trained)
    vae.load_state_dict(torch.load(trained, weights_only=True))
    parts = []
    with torch.no_grad():
        for first in tqdm(range(0, arguments.images, 64), desc="encode"):
            images = draw_batch(chosen[first : first + 64], rng, half[first : first + 64])
            parts.append(vae.encode(images).latent_dist.mean * vae.config.scaling_factor)
    latents = torch.cat(parts)
    torch.save(latents, cache)
    return {"latents": latents, "scenes": chosen, "half": half}


def train_denoiser(arguments: argparse.Namespace) -> None:
    """Train UNet and text encoders together and write denoiser.pt."""
    tokenizers = []
    for name, pad_token in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        write_tokenizer(arguments.folder / name, pad_token)
        tokenizers.append(CLIPTokenizer.from_pretrained(arguments.folder / name))
    encoded = encode_scenes(arguments)
    torch.manual_seed(arguments.seed)
    unet = architecture.build_unet()
    text_encoder, text_encoder_2 = architecture.build_text_encoders(*tokenizers)
    model = nn.ModuleDict(
        {"unet": unet, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    )
    training = Training(model, arguments, arguments.folder / "denoiser_state.pt", decay=0.99)
    signal_power = architecture.build_scheduler().alphas_cumprod

    def embed(captions: list[str], zeroed: Tensor) -> tuple[Tensor, Tensor]:
        ids, ids_2 = (
            tokenizer(
                captions,
                padding="max_length",
                max_length=TOKEN_COUNT,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in tokenizers
        )
        output = text_encoder(ids, output_hidden_states=True)
        output_2 = text_encoder_2(ids_2, output_hidden_states=True)
        context = torch.cat([output.hidden_states[-2], output_2.hidden_states[-2]], dim=-1)
        kept = 1 - zeroed
        return context * kept[:, None, None], output_2.text_embeds * kept[:, None]

    def loss_of(rng: np.random.Generator) -> Tensor:
        batch = rng.integers(arguments.images, size=arguments.batch)
        fate = rng.random(arguments.batch)  # below 0.05 empty prompt, below 0.1 zeroed embeddings
        captions = [
            "" if fate[row] < 0.05 else describe(encoded["scenes"][index], rng)
            for row, index in enumerate(batch)
        ]
        zeroed = torch.from_numpy((fate >= 0.05) & (fate < 0.1)).float()
        context, pooled = embed(captions, zeroed)
        original = np.where(encoded["half"][batch], HALF, RESOLUTION)
        time_ids = torch.tensor([(side, side, 0, 0, RESOLUTION, RESOLUTION) for side in original])
        latents = encoded["latents"][batch]
        # More of the noisy end, where the caption decides and the image does not yet.
        timesteps = torch.from_numpy((1000 * rng.random(arguments.batch) ** 0.5).astype(np.int64))
        power = signal_power[timesteps][:, None, None, None]
        # The sampler starts from noise of mean zero. Were that so in training too, the mean of even
        # the noisiest latent would betray the background, and the caption would go unread.
        noise = torch.randn_like(latents) + NOISE_OFFSET * torch.randn(*latents.shape[:2], 1, 1)
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
        noisy = power.sqrt() * latents + (1 - power).sqrt() * noise
        predicted = unet(noisy, timesteps, context, added_cond_kwargs=conditions).sample
        # Near pure noise a wrong background costs little in units of noise, though it is what is
        # decided there; in units of velocity (1 / signal power) every level counts.
        error = (predicted - noise).square().mean((1, 2, 3))
        return (error / power.flatten().clamp(min=0.02)).mean()

    training.run(loss_of)
    torch.save(training.average.module.state_dict(), arguments.folder / "denoiser.pt")


def main() -> None:
    """Parse the command line and run one stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("vae", "denoiser"))
    parser.add_argument("--folder", type=Path, required=True, help="working folder")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--images", type=int, default=8192, help="encoded for the denoiser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    {"vae": train_vae, "denoiser": train_denoiser}[arguments.stage](arguments)


if __name__ == "__main__":
    main()
