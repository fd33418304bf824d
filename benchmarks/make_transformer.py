"""Random checkpoints of transformers, small or of full size, and statistics for them.

    python -m benchmarks.make_transformer flux flux.safetensors --stats flux.stats.safetensors

Flux has 11.9 G weights in 504 Linears (24 GB), Z-Image 6.15 G in 276 (12.3 GB), Qwen-Image 20.4 G
in 846 (41 GB), all bfloat16 in the layout of single files, with ComfyUI's prefix. The weights
repeat one run of normal numbers; the statistics are random and say that they belong to the file:
what is measured with them is time and memory.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.cases import Pool, noise
from hswq.calibration import Calibration, LayerStatistics
from hswq.formats.reader import Checkpoint
from hswq.formats.writer import CheckpointWriter, TensorSpec
from hswq.models.detect import detect
from hswq.models.fingerprint import fingerprint
from hswq.models.trace import trace_map

PREFIX = "model.diffusion_model."


def flux_shapes(
    width: int = 64,
    head: int = 16,
    double: int = 1,
    single: int = 1,
    text: int = 32,
    pooled: int = 24,
    inputs: int = 64,
) -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes of a Flux.1-dev transformer in BFL's layout."""
    linears = {
        "img_in": (width, inputs),
        "txt_in": (width, text),
        "final_layer.linear": (inputs, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for name, inputs in (("time_in", 256), ("vector_in", pooled), ("guidance_in", 256)):
        linears |= {f"{name}.in_layer": (width, inputs), f"{name}.out_layer": (width, width)}
    scales = {}
    for number in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{number}.{stream}_"
            linears |= {
                f"{block}mod.lin": (6 * width, width),
                f"{block}attn.qkv": (3 * width, width),
                f"{block}attn.proj": (width, width),
                f"{block}mlp.0": (4 * width, width),
                f"{block}mlp.2": (width, 4 * width),
            }
            for norm in ("query", "key"):
                scales[f"{block}attn.norm.{norm}_norm.scale"] = (head,)
    for number in range(single):
        block = f"single_blocks.{number}."
        linears |= {
            f"{block}modulation.lin": (3 * width, width),
            f"{block}linear1": (7 * width, width),
            f"{block}linear2": (width, 5 * width),
        }
        for norm in ("query", "key"):
            scales[f"{block}norm.{norm}_norm.scale"] = (head,)
    return {**_with_biases(linears), **scales}


def z_image_shapes(
    width: int = 64,
    head: int = 16,
    layers: int = 2,
    refiners: int = 1,
    text: int = 32,
    inputs: int = 64,
) -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes of a Z-Image transformer in ComfyUI's layout."""
    embedding, hidden = min(width, 256), int(width / 3 * 8)
    linears = {
        "x_embedder": (width, inputs),
        "final_layer.linear": (inputs, width),
        "final_layer.adaLN_modulation.1": (width, embedding),
        "t_embedder.mlp.0": (1024, 256),
        "t_embedder.mlp.2": (embedding, 1024),
        "cap_embedder.1": (width, text),
    }
    others = {
        "cap_embedder.0.weight": (text,),
        "x_pad_token": (1, width),
        "cap_pad_token": (1, width),
        "norm_final.weight": (width,),
    }
    blocks = [(f"layers.{number}.", True) for number in range(layers)]
    for number in range(refiners):
        blocks += [(f"noise_refiner.{number}.", True), (f"context_refiner.{number}.", False)]
    for block, modulated in blocks:
        if modulated:
            linears[f"{block}adaLN_modulation.0"] = (4 * width, embedding)
        others |= {
            f"{block}attention.qkv.weight": (3 * width, width),
            f"{block}attention.out.weight": (width, width),
            f"{block}attention.q_norm.weight": (head,),
            f"{block}attention.k_norm.weight": (head,),
            f"{block}feed_forward.w1.weight": (hidden, width),
            f"{block}feed_forward.w2.weight": (width, hidden),
            f"{block}feed_forward.w3.weight": (hidden, width),
        }
        for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            others[f"{block}{norm}.weight"] = (width,)
    return {**_with_biases(linears), **others}


def qwen_image_shapes(
    width: int = 64, head: int = 16, layers: int = 2, text: int = 32
) -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes of a Qwen-Image transformer."""
    linears = {
        "time_text_embed.timestep_embedder.linear_1": (width, 256),
        "time_text_embed.timestep_embedder.linear_2": (width, width),
        "img_in": (width, 64),
        "txt_in": (width, text),
        "norm_out.linear": (2 * width, width),
        "proj_out": (64, width),
    }
    norms = {"txt_norm.weight": (text,)}
    for number in range(layers):
        block = f"transformer_blocks.{number}."
        for stream in ("img", "txt"):
            linears |= {
                f"{block}{stream}_mod.1": (6 * width, width),
                f"{block}{stream}_mlp.net.0.proj": (4 * width, width),
                f"{block}{stream}_mlp.net.2": (width, 4 * width),
            }
        names = ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")
        names += tuple(f"add_{part}_proj" for part in "qkv")
        linears |= {f"{block}attn.{name}": (width, width) for name in names}
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            norms[f"{block}attn.{name}.weight"] = (head,)
    return {**_with_biases(linears), **norms}


def _with_biases(linears: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    weights = {f"{name}.weight": shape for name, shape in linears.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in linears.items()}


FULL_SIZE = {
    "flux": lambda: flux_shapes(3072, 128, 19, 38, 4096, 768),
    "z-image": lambda: z_image_shapes(3840, 128, 30, 2, 2560),
    "qwen-image": lambda: qwen_image_shapes(3072, 128, 60, 3584),
}


def write_checkpoint(path: Path, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
    """Write bfloat16 tensors, one in memory at a time."""
    pool = Pool(noise(torch.bfloat16, seed))
    specs = [TensorSpec(PREFIX + name, "BF16", shape) for name, shape in shapes.items()]
    with CheckpointWriter(path, specs, 0) as writer:
        for spec in specs:
            count = math.prod(spec.shape)
            # The pool holds fewer numbers than the largest layers.
            rows = 1 if len(spec.shape) < 2 else spec.shape[0]
            step = max(1, min(rows, (1 << 24) // (count // rows)))
            for start in range(0, rows, step):
                part = pool.take((min(step, rows - start), count // rows))
                writer.write_chunk(spec.name, start * (count // rows) * 2, part)
        writer.commit({})


def write_statistics(checkpoint_path: Path, path: Path, seed: int) -> None:
    """Write random statistics of one call of every layer."""
    generator = torch.Generator().manual_seed(seed)
    with Checkpoint.open(checkpoint_path) as checkpoint:
        model_map = trace_map(checkpoint, detect(checkpoint))
        modules = {}
        for module in model_map.modules:
            means = torch.rand(module.in_channels, generator=generator) + 0.1
            modules[module.name] = LayerStatistics(
                *(module.kind, module.shape, module.groups),
                *(1, 0, 0, int(torch.randint(1 << 56, (), generator=generator))),
                (means.double() * 2**32).long(),
            )
        Calibration(modules, model_map, fingerprint(checkpoint, model_map)).save(path)


def main() -> None:
    """Write a checkpoint of full size and, where asked, its statistics."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=tuple(FULL_SIZE))
    parser.add_argument("output", type=Path)
    parser.add_argument("--stats", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_checkpoint(options.output, FULL_SIZE[options.family](), options.seed)
    if options.stats is not None:
        write_statistics(options.output, options.stats, options.seed)


if __name__ == "__main__":
    main()
