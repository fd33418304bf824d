"""Write random prompt embeddings of SDXL's shapes, for runs without text encoders."""

from __future__ import annotations

import argparse

import torch

from hswq.formats.writer import CheckpointWriter, TensorSpec


def main() -> None:
    """Write `--prompts` random prompts and one negative prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--width", type=int, default=2048, help="cross-attention width")
    parser.add_argument("--pooled", type=int, default=1280, help="width of the pooled embedding")
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "prompt_embeds": (arguments.prompts, 77, arguments.width),
        "pooled_prompt_embeds": (arguments.prompts, arguments.pooled),
        "negative_prompt_embeds": (1, 77, arguments.width),
        "negative_pooled_prompt_embeds": (1, arguments.pooled),
    }
    specs = [TensorSpec(name, "F32", shape) for name, shape in shapes.items()]
    with CheckpointWriter(arguments.output, specs, metadata_bytes=2) as writer:
        for name, shape in shapes.items():
            writer.write(name, torch.randn(shape, generator=generator))
        writer.commit({})


if __name__ == "__main__":
    main()
