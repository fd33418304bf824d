"""Write the trained demo model as a user would have it, check the file, paint the contact sheet.

Out come `demo.safetensors` (float16, single-file LDM layout), a pipeline folder of configurations
and tokenizers without weights, `prompts.txt`, and the contact sheet. Names are turned back from
diffusers' to LDM's, and the result is checked: diffusers' own loader must give back every trained
weight from the file, and 64 images are painted from prompts training never saw and read by
`shapes.recognize`.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from benchmarks import ldm_layout
from benchmarks.demo_model import architecture
from benchmarks.demo_model.shapes import (
    RESOLUTION,
    Scene,
    agreement,
    demo_scenes,
    describe,
    recognize,
    write_tokenizer,
)
from benchmarks.record import record

METADATA = {
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    "modelspec.title": "hswq demo",
    "modelspec.description": "A small latent diffusion model of SDXL's topology that paints shapes",
    "modelspec.author": "the hswq project",
    "modelspec.license": "Apache-2.0",
    "modelspec.prediction_type": "epsilon",
    "modelspec.resolution": f"{RESOLUTION}x{RESOLUTION}",
}


def single_file_state(models: dict[str, nn.Module]) -> dict[str, Tensor]:
    """All weights under the names of SDXL's single-file checkpoints, in float16."""
    parts = {
        "unet": ldm_layout.unet_state(models["unet"]),
        "vae": ldm_layout.vae_state(models["vae"]),
        "text_encoder": ldm_layout.text_encoder_state(models["text_encoder"]),
        "text_encoder_2": ldm_layout.open_clip_state(models["text_encoder_2"]),
    }
    return {
        ldm_layout.PREFIXES[part] + name: weight.half() if weight.is_floating_point() else weight
        for part, state in parts.items()
        for name, weight in state.items()
    }


def write_pipeline_folder(folder: Path, models: dict[str, nn.Module]) -> None:
    """Write configurations and tokenizers as diffusers lays them out, without weights."""
    index = json.dumps(architecture.model_index(), indent=2) + "\n"
    (folder / "model_index.json").write_text(index, encoding="utf-8")
    for name in ("unet", "vae"):
        models[name].save_config(folder / name)
    architecture.build_scheduler().save_config(folder / "scheduler")
    for name in ("text_encoder", "text_encoder_2"):
        (folder / name).mkdir(exist_ok=True)
        config = models[name].config
        config.architectures = [type(models[name]).__name__]
        config.to_json_file(folder / name / "config.json")


def load_trained(trained: Path, folder: Path) -> dict[str, nn.Module]:
    """The trained models of the working folder; tokenizers are read from the pipeline folder."""
    text_encoder, text_encoder_2 = architecture.build_text_encoders(
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
    )
    denoiser = nn.ModuleDict(
        {
            "unet": architecture.build_unet(),
            "text_encoder": text_encoder,
            "text_encoder_2": text_encoder_2,
        }
    )
    denoiser.load_state_dict(torch.load(trained / "denoiser.pt", weights_only=True))
    vae = architecture.build_vae()
    vae.load_state_dict(torch.load(trained / "vae.pt", weights_only=True))
    return {**denoiser, "vae": vae}


def check_weights(models: dict[str, nn.Module], pipeline: StableDiffusionXLPipeline) -> None:
    """Raise unless every weight the pipeline loaded is the trained one in float16."""
    for name, model in models.items():
        loaded = getattr(pipeline, name).state_dict()
        trained = {key: weight.half() for key, weight in model.state_dict().items()}
        if loaded.keys() != trained.keys():
            raise ValueError(f"{name}: loaded weights differ in {loaded.keys() ^ trained.keys()}")
        wrong = [key for key in trained if not torch.equal(loaded[key], trained[key].float())]
        if wrong:
            raise ValueError(f"{name}: {len(wrong)} loaded weights differ, first '{wrong[0]}'")


def paint(pipeline: StableDiffusionXLPipeline, prompts: list[str], guidance: float) -> np.ndarray:
    """One image a prompt, 25 Euler steps, seeded by its row: float32 [N, H, W, 3] in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for first in tqdm(range(0, len(prompts), 8), desc="paint"):
        rows = range(first, min(first + 8, len(prompts)))
        batch = pipeline(
            [prompts[row] for row in rows],
            num_inference_steps=25,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(row) for row in rows],
            output_type="np",
        )
        images.append(batch.images)
    return np.concatenate(images)


def contact_sheet(images: np.ndarray, captions: list[str], columns: int = 6) -> Image.Image:
    """Images at twice their size in rows, their captions underneath."""
    side, gap, text_height = 2 * RESOLUTION, 10, 44
    width, height = side + gap, side + text_height
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = gap + number % columns * width, gap + number // columns * height
        pixels = Image.fromarray((image * 255).round().astype(np.uint8))
        sheet.paste(pixels.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        text = textwrap.fill(caption, 25)
        pen.text((x, y + side + 2), text, "black", font_size=11, spacing=1)
    return sheet


def main() -> None:
    """Export, load back, compare, paint, count what is right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--folder", type=Path, required=True, help="working folder of train.py")
    parser.add_argument("--output", type=Path, default=root / "hswq/models/assets/demo")
    parser.add_argument("--sheet", type=Path, default=root / "docs/demo_contact_sheet.png")
    parser.add_argument("--guidance", type=float, default=4.0)
    arguments = parser.parse_args()
    output = arguments.output
    for name, pad_token in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        write_tokenizer(output / name, pad_token)
    models = load_trained(arguments.folder, output)
    write_pipeline_folder(output, models)
    checkpoint = output / "demo.safetensors"
    save_file(single_file_state(models), checkpoint, METADATA)
    checkpoint.chmod(0o644)  # safetensors writes files only their owner can read
    scenes = demo_scenes()
    prompts = [describe(scene) for scene in scenes]
    (output / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")

    source = {"config": str(output), "local_files_only": True}
    pipeline = StableDiffusionXLPipeline.from_single_file(str(checkpoint), **source)
    check_weights(models, pipeline)
    unet = UNet2DConditionModel.from_single_file(str(checkpoint), subfolder="unet", **source)
    check_weights({"unet": unet}, pipeline)
    sizes = {key: weight.nbytes for key, weight in load_file(checkpoint).items()}
    unet_bytes = sum(size for key, size in sizes.items() if key.startswith("model.diffusion"))
    print(f"{checkpoint.stat().st_size} bytes, {len(sizes)} tensors, UNet {unet_bytes} bytes")

    images = paint(pipeline, prompts, arguments.guidance)
    contact_sheet(images[:24], prompts[:24]).save(arguments.sheet, optimize=True)
    right = np.array(
        [agreement(scene, recognize(image)) for scene, image in zip(scenes, images, strict=True)]
    )
    counts = {
        field.name: int(count) for field, count in zip(fields(Scene), right.sum(0), strict=True)
    }
    record(
        {
            "op": "demo_model",
            "prompts": len(prompts),
            "steps": 25,
            "guidance": arguments.guidance,
            "right": {**counts, "all": int(right.all(1).sum())},
        }
    )


if __name__ == "__main__":
    main()
