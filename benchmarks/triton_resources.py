"""Registers, spills and shared memory of every Triton kernel, compiled ahead of time.

Needs no GPU: each kernel of the backend's table is compiled for every target with every signature
and configuration. Writes JSON lines to results/triton_resources.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from hswq.kernels.triton_backend import KERNELS
from hswq.kernels.triton_backend._configs import Config, Kernel

RESULTS = Path(__file__).parent / "results" / "triton_resources.jsonl"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SMOKE_TARGETS = ("sm_90", "gfx942")
ASSEMBLY = {"cuda": "ptx", "hip": "amdgcn"}


class Variant(NamedTuple):
    """One thing to compile."""

    kernel: Kernel
    signature: Mapping[str, str]
    config: Config
    target: str

    @property
    def name(self) -> str:
        """Return a name that is also a file's."""
        index = self.kernel.signatures.index(self.signature)
        return f"{self.kernel.function.__name__}-{index}-{self.config.name}-{self.target}"


def variants(smoke: bool) -> Iterator[Variant]:
    """Go through the table; `smoke` takes the first of each list and two targets."""
    first = slice(0, 1) if smoke else slice(None)
    for kernel in KERNELS:
        for signature in kernel.signatures[first]:
            for config in kernel.configs[first]:
                for target in SMOKE_TARGETS if smoke else TARGETS:
                    if runs_on(kernel, target):
                        yield Variant(kernel, signature, config, target)


def runs_on(kernel: Kernel, target: str) -> bool:
    """Tell whether a kernel is meant for a target: some are for NVIDIA's newer GPUs only."""
    found = TARGETS[target]
    capability = found.arch if found.backend == "cuda" else 0
    return kernel.least_capability <= capability


def compile_variant(variant: Variant) -> CompiledKernel:
    """Compile as a launch would: alignment and compile-time arguments as the signature says."""
    types: dict[str, str] = {}
    constants: dict[str, int] = dict(variant.config.constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(variant.kernel.function.arg_names):
        kind, _, hint = variant.signature.get(name, "constexpr").partition(":")
        if hint == "16":
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif hint == "1":
            kind, constants[name] = "constexpr", 1
        types[name] = kind
    return triton.compile(
        ASTSource(variant.kernel.function, types, constants, attributes),
        target=TARGETS[variant.target],
        options={"num_warps": variant.config.num_warps, "enable_fp_fusion": False},
    )


def cuda_resources(cubin: bytes) -> dict[str, int]:
    """Read registers and thread-local memory off a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    registers, stack, local = map(int, usage)
    return {"registers": registers, "spill_bytes": stack + local}


def hip_resources(assembly: str) -> dict[str, int]:
    """Read vector registers and thread-local memory off AMD assembly."""

    def field(name: str) -> int:
        (value,) = re.findall(rf"^\s*\.{name}:\s*(\d+)", assembly, re.MULTILINE)
        return int(value)

    return {
        "registers": field("vgpr_count"),
        "spill_bytes": field("private_segment_fixed_size"),
    }


def measure(variant: Variant, assembly_folder: Path | None) -> dict[str, Any]:
    """Compile one variant and return its row.

    registers: a thread. spill_bytes: memory a thread holds because its registers do not suffice.
    shared_bytes: a program.
    """
    compiled = compile_variant(variant)
    backend = TARGETS[variant.target].backend
    assembly = compiled.asm[ASSEMBLY[backend]]
    if assembly_folder is not None:
        (assembly_folder / f"{variant.name}.{ASSEMBLY[backend]}").write_text(assembly)
    used = cuda_resources(compiled.asm["cubin"]) if backend == "cuda" else hip_resources(assembly)
    return {
        "name": variant.name,
        "kernel": variant.kernel.function.__name__,
        "signature": dict(variant.signature),
        "config": {
            "name": variant.config.name,
            **variant.config.constants,
            "num_warps": variant.config.num_warps,
        },
        "target": variant.target,
        **used,
        "shared_bytes": compiled.metadata.shared,
        "triton": triton.__version__,
    }


# Kernels cannot be sent to another process, but a forked one has them.
_variants: list[Variant] = []


def _line(number: int, assembly_folder: Path | None) -> str:
    return json.dumps(measure(_variants[number], assembly_folder)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few variants; prints, writes no file")
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--assembly", type=Path, help="folder for the PTX and AMD assembly")
    options = parser.parse_args()
    if not all(isinstance(kernel.function, triton.JITFunction) for kernel in KERNELS):
        sys.exit("TRITON_INTERPRET is set, so that nothing can be compiled: unset it.")
    _variants.extend(variants(options.smoke))
    line = functools.partial(_line, assembly_folder=options.assembly)
    with multiprocessing.get_context("fork").Pool() as pool:
        lines = pool.map(line, range(len(_variants)), chunksize=1)
    if options.smoke:
        print("".join(lines), end="")
    else:
        options.output.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
