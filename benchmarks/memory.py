"""Peak memory of `quantize --stats` against the size of the checkpoint.

    python -m benchmarks.memory --folder /tmp               # 1.3 to 24 GB; 36 GB of disk
    python -m benchmarks.memory --plot docs/memory.svg      # draws this machine's latest rows

Transformers of Flux's width with 1 to 19 double and twice as many single blocks, bfloat16, random.
Each run is a process of its own, whose largest resident memory is what it reports; `start` is that
of a process that has imported what the run needs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.make_transformer import flux_shapes, write_checkpoint, write_statistics
from benchmarks.record import RESULTS, machine_name, record
from hswq.quality.plots import pyplot, save

BLOCKS = (1, 2, 4, 8, 19)
KINDS = {"V1": [], "V2": ["--scaled", "--container", "hswq"]}
_START = "import hswq.driver, torch; from hswq.driver.report import peak_memory_bytes; "
_START += "from hswq import kernels; kernels.backend_report(); print(peak_memory_bytes())"


def measure(options: argparse.Namespace) -> None:
    """Write a checkpoint of every size, quantize it, record the peaks, and remove it."""
    start = int(subprocess.check_output([sys.executable, "-c", _START]))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source, stats, output = (
            Path(name) / f"{part}.safetensors" for part in ("source", "stats", "output")
        )
        for blocks in options.blocks:
            write_checkpoint(source, flux_shapes(3072, 128, blocks, 2 * blocks, 4096, 768), 0)
            write_statistics(source, stats, 0)
            for kind, flags in KINDS.items():
                command = ["quantize", "--input", str(source), "--stats", str(stats)]
                command += ["--output", str(output), "--preset", "seed", "--json", "--quiet"]
                printed = subprocess.check_output(
                    [sys.executable, "-m", "hswq.fast", *command, *flags]
                )
                report = json.loads(printed)
                record(
                    {
                        "op": "memory",
                        "kind": kind,
                        "source_bytes": report["source_bytes"],
                        "output_bytes": report["output_bytes"],
                        "peak_bytes": report["peak_memory_bytes"],
                        "start_bytes": start,
                    }
                )
                output.unlink()


def latest_rows(kind: str) -> list[dict[str, Any]]:
    """Return this machine's last row of every size of a kind, by size."""
    lines = (RESULTS / f"{machine_name()}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["op"] == "memory" and row["kind"] == kind]
    latest = {row["source_bytes"]: row for row in rows}
    return [latest[size] for size in sorted(latest)]


def plot(path: Path) -> None:
    """Draw the peaks against the sizes, and the line on which memory would equal the input."""
    figure, axes = pyplot().subplots(figsize=(6.4, 4.0), layout="constrained")
    for kind, marker in zip(KINDS, "so", strict=True):
        rows = latest_rows(kind)
        sizes = [row["source_bytes"] / 1e9 for row in rows]
        axes.plot(sizes, [row["peak_bytes"] / 1e9 for row in rows], marker + "-", label=kind)
    axes.plot(sizes, sizes, ":", color="gray", label="the whole input")
    axes.plot(
        sizes, [row["start_bytes"] / 1e9 for row in rows], "--", color="gray", label="imports"
    )
    axes.set(xlabel="checkpoint, GB", ylabel="largest resident memory, GB", ylim=(0, 4))
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False)
    save(figure, path, path.suffix[1:])


def main() -> None:
    """Measure, or draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="for the checkpoints")
    parser.add_argument("--blocks", type=int, nargs="+", default=list(BLOCKS))
    parser.add_argument("--plot", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.plot is not None:
        plot(options.plot)
    else:
        measure(options)


if __name__ == "__main__":
    main()
