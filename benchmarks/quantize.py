"""Time and memory of `quantize --stats` on a checkpoint, each run in a process of its own.

The baseline is a plain copy of the input file. Example, with a full-size random SDXL checkpoint
(5.1 GB) and statistics from two sampler steps on a small latent:

    python -m benchmarks.make_checkpoint big.safetensors --unet-only
    python -m benchmarks.make_embeddings --output embeddings.safetensors
    python -m hswq.fast calibrate --input big.safetensors --output stats.safetensors \
        --embeddings embeddings.safetensors --latent 16 --samples 1 --steps 2
    python -m benchmarks.quantize --input big.safetensors --stats stats.safetensors
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import record

VARIANTS = {
    "v1-comfy": [],
    "v2-comfy": ["--scaled"],
    "v2-hswq": ["--scaled", "--container", "hswq"],
}


def main() -> None:
    """Run the copy and every variant, one after the other, and record a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, type=Path)
    parser.add_argument("--stats", required=True, type=Path)
    parser.add_argument("--backend", choices=("reference", "cpp"), default="cpp")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.input.parent) as folder:
        output = Path(folder) / "output.safetensors"
        start = time.perf_counter()
        shutil.copyfile(arguments.input, output)
        copy_s = time.perf_counter() - start
        output.unlink()
        record(
            {
                "op": "copy",
                "input_bytes": arguments.input.stat().st_size,
                "wall_s": round(copy_s, 2),
            }
        )
        for variant in arguments.variants:
            command = [
                *(sys.executable, "-m", "hswq.fast", "quantize", "--json", "--quiet"),
                *("--input", str(arguments.input), "--output", str(output)),
                *("--stats", str(arguments.stats), "--backend", arguments.backend),
                *VARIANTS[variant],
            ]
            start = time.perf_counter()
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            wall_s = time.perf_counter() - start
            report = json.loads(done.stdout)
            record(
                {
                    "op": "quantize",
                    "variant": variant,
                    "backend": arguments.backend,
                    "device": "cpu",
                    "layers": report["layers"],
                    "quantized": report["quantized"],
                    "input_bytes": report["source_bytes"],
                    "output_bytes": report["output_bytes"],
                    "wall_s": round(wall_s, 2),
                    "phases_s": report["seconds"],
                    "peak_memory_bytes": report["peak_memory_bytes"],
                    "copy_s": round(copy_s, 2),
                }
            )


if __name__ == "__main__":
    main()
