"""Every Triton kernel compiles ahead of time for every GPU it is meant for; needs no GPU.

benchmarks/triton_resources.py does the compiling, in a process of its own without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "triton_resources.py"
TARGETS = {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}
# Kernels whose bytes must equal the reference's, and the types that they divide: no approximate
# division, no fused multiply-add.
EXACT = {
    "quantize_e4m3_kernel": {"f32"},
    "dequantize_e4m3_kernel": set(),
    "sum_weights_kernel": {"f32", "f64"},
    "finish_histogram_kernel": {"f32", "f64"},
    "search_amax_kernel": {"f64"},
    "round_compensated_kernel": {"f32", "f64"},
    "sweep_codes_kernel": {"f32"},
}
INEXACT = r"\.ftz|\bfma\.|\bmad\.\S*f\d\d|div\.(?:full|approx)\S*|e4m3x2"
# Kernels that the memory's speed limits, and the argument that tells the aligned launches.
MEMORY_BOUND = {
    "quantize_e4m3_kernel": "columns",
    "dequantize_e4m3_kernel": "columns",
    "sum_weights_kernel": "columns",
    "largest_bits_kernel": "columns",
    "largest_magnitude_kernel": "size",
    "monitor_kernel": "y_size",
    "quantize_rows_kernel": "columns",
}


def run_script(cache: Path, *arguments: str | Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """The whole table, and the folder with the assembly of each row."""
    folder = tmp_path_factory.mktemp("triton")
    output = folder / "rows.jsonl"
    run_script(folder / "cache", "--output", output, "--assembly", folder)
    return rows_of(output.read_text(encoding="utf-8")), folder


def test_every_kernel_is_in_the_table() -> None:
    """A kernel that is not in KERNELS would never be compiled before a user's GPU does it."""
    from hswq.kernels import triton_backend

    found = set()
    for module in pkgutil.iter_modules(triton_backend.__path__, triton_backend.__name__ + "."):
        members = vars(importlib.import_module(module.name))
        found |= {name for name in members if name.endswith("_kernel")}
    assert found == {kernel.function.__name__ for kernel in triton_backend.KERNELS}


def test_first_variants_compile_without_spills(tmp_path: Path) -> None:
    """The script would be rotten, or a kernel would not compile at all."""
    rows = rows_of(run_script(tmp_path, "--smoke"))
    assert {row["target"] for row in rows} == {"sm_90", "gfx942"}
    assert [row for row in rows if row["spill_bytes"]] == []


@pytest.mark.slow
def test_all_variants_compile(
    compiled: tuple[list[dict[str, Any]], Path],
) -> None:
    """A kernel would fail on some GPU, or move registers through memory while bound by memory."""
    from hswq.kernels import triton_backend

    rows, _ = compiled
    # Products of codepoints are for GPUs that have them: NVIDIA's from compute capability 8.9 on.
    targets = {0: TARGETS, 89: TARGETS - {"sm_80", "gfx942"}}
    expected = {
        (kernel.function.__name__, config.name, target)
        for kernel in triton_backend.KERNELS
        for config in kernel.configs
        for target in targets[kernel.least_capability]
    }
    assert {(row["kernel"], row["config"]["name"], row["target"]) for row in rows} == expected
    assert len(rows) == sum(
        len(targets[kernel.least_capability]) * len(kernel.signatures) * len(kernel.configs)
        for kernel in triton_backend.KERNELS
    )
    assert all(row["registers"] > 0 for row in rows)
    spills = {row["name"]: row["spill_bytes"] for row in rows if row["spill_bytes"]}
    assert [name for name in spills if name.split("-")[0] in MEMORY_BOUND] == []
    # ptxas would rather run two programs side by side.
    assert max(spills.values(), default=0) <= 256


@pytest.mark.slow
@pytest.mark.parametrize("kernel", EXACT)
def test_exact_kernels_use_ieee_arithmetic(
    kernel: str, compiled: tuple[list[dict[str, Any]], Path]
) -> None:
    """Flushed subnormals, an approximate division or a fused product would change codepoints."""
    _, folder = compiled
    ptx = [path.read_text(encoding="utf-8") for path in folder.glob(f"{kernel}-*.ptx")]
    assert ptx
    divided = set()
    for text in ptx:
        assert (
            re.findall(r"\.ftz|\bfma\.|\bmad\.\S*f\d\d|div\.(?:full|approx)\S*|e4m3x2", text) == []
        )
        divided |= set(re.findall(r"div\.rn\.(f\d\d)", text))
    assert divided == EXACT[kernel]
    amd = [path.read_text(encoding="utf-8") for path in folder.glob(f"{kernel}-*.amdgcn")]
    assert amd
    for text in amd:
        # 3: subnormals are kept in inputs and results.
        assert re.search(r"\.amdhsa_float_denorm_mode_32 3\b", text)
        assert re.search(r"\.amdhsa_float_denorm_mode_16_64 3\b", text)
    # The last step of LLVM's correctly rounded division.
    assert set(re.findall(r"v_div_fixup_(f\d\d)", "".join(amd))) == EXACT[kernel]


@pytest.mark.slow
def test_decoded_weights_stay_in_registers(compiled: tuple[list[dict[str, Any]], Path]) -> None:
    """On Hopper a decoded tile would go through shared memory if it were the second operand."""
    rows, folder = compiled
    found = [
        row["name"]
        for row in rows
        if row["kernel"] == "scaled_matmul_kernel"
        and row["target"] == "sm_90"
        and row["config"]["name"] in ("many-fp16", "many-bf16")
    ]
    assert len(found) == 2
    for name in found:
        text = (folder / f"{name}.ptx").read_text(encoding="utf-8")
        assert re.search(r"wgmma\.mma_async\.\S+\.f32\.b?f16\.b?f16 \{[^}]*\}, \{", text), name
        assert "st.shared" not in text, name


@pytest.mark.slow
@pytest.mark.parametrize("kernel", MEMORY_BOUND)
def test_aligned_tensors_move_in_16_bytes(
    kernel: str, compiled: tuple[list[dict[str, Any]], Path]
) -> None:
    """Narrow loads would keep a memory-bound kernel from the memory's speed."""
    rows, folder = compiled
    aligned = {
        row["name"]
        for row in rows
        if row["kernel"] == kernel
        and row["signature"][MEMORY_BOUND[kernel]] == "i32:16"
        and row["target"].startswith("sm_")
    }
    assert aligned
    for name in aligned:
        text = (folder / f"{name}.ptx").read_text(encoding="utf-8")
        assert re.search(r"ld\.global(\.\w+)*\.v4\.b32", text), name
        if kernel.endswith("quantize_e4m3_kernel"):
            assert re.search(r"st\.global(\.\w+)*\.v4\.b32", text), name
