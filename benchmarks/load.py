"""Memory and time of loading an FP8 UNet, in a process of its own.

    python -m benchmarks.load --input v2.safetensors

`held_bytes` are the loaded module's parameters and buffers, `share_of_fp16` what that is of the
same numbers in float16. `peak_bytes` is by how much the largest resident memory during the loading
exceeds what the process held before it, with diffusers imported and the UNet built without weights;
it is compared with the file's size and that of its largest tensor. Example, after the commands of
benchmarks.quantize that make a checkpoint of full size and statistics:

    python -m hswq.fast quantize --input big.safetensors --stats stats.safetensors --scaled \
        --container hswq --keep-ratio 0 --output v2.safetensors
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.record import record

CHILD = "--in-child"


def measure(path: Path, compute: str) -> dict[str, int | float]:
    """Load the UNet of a file once; the process must be fresh."""
    import hswq
    from benchmarks.matmul import status_bytes
    from hswq.formats.reader import Checkpoint
    from hswq.models.denoiser import denoiser_config, meta_denoiser
    from hswq.models.detect import detect

    with Checkpoint.open(path) as checkpoint:
        config, _ = denoiser_config(checkpoint, None, detect(checkpoint))
        largest = max(info.nbytes for info in checkpoint.tensors.values())
        file_bytes = sum(file.stat().st_size for file in checkpoint.files)
    meta_denoiser(config)
    hswq.register_diffusers()
    before = status_bytes("VmRSS")
    begin = time.perf_counter()
    unet = hswq.load_unet(path, compute)
    seconds = time.perf_counter() - begin
    tensors = [*unet.parameters(), *unet.buffers()]
    return {
        "layers": sum(isinstance(it, hswq.Linear | hswq.Conv2d) for it in unet.modules()),
        "seconds": round(seconds, 2),
        "file_bytes": file_bytes,
        "largest_tensor_bytes": largest,
        "held_bytes": sum(tensor.nbytes for tensor in tensors),
        "fp16_bytes": 2 * sum(tensor.numel() for tensor in tensors),
        "peak_bytes": status_bytes("VmHWM") - before,
    }


def main() -> None:
    """Load in a child, record one row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--compute", default="auto")
    parser.add_argument(CHILD, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_child:
        print(json.dumps(measure(options.input, options.compute)))
        return
    command = [sys.executable, "-m", "benchmarks.load", *sys.argv[1:], CHILD]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    row = json.loads(output.splitlines()[-1])
    allowed = row["file_bytes"] + row["largest_tensor_bytes"]
    record(
        {
            "op": "load_unet",
            "case": options.compute,
            **row,
            "share_of_fp16": round(row["held_bytes"] / row["fp16_bytes"], 4),
            "peak_over_allowed": round(row["peak_bytes"] / allowed, 4),
        }
    )


if __name__ == "__main__":
    main()
