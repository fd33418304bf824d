"""The Triton kernels in Triton's interpreter, on the CPU: the same bytes as the reference.

Triton reads TRITON_INTERPRET when the kernels are imported, so the checks run in a process of their
own: this file, started as a program. It counts the launches of every kernel, which proves that the
kernels and no substitute gave the answers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections import Counter
from typing import Any

import pytest
import torch

# A plain FP8 file, a common scale, one that is no power of two, and scales whose quotients or whose
# own value leave float32's normal range.
SCALES = (1.0, 0.07 / 448, 0.0123, 1e5, 1e-30, 3e-40)
# More than any weight here, so that nothing is clipped.
NO_CLIP = torch.finfo(torch.float32).max
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def all_patterns(dtype: torch.dtype) -> torch.Tensor:
    """Return every value of a 16-bit type, both zeros, subnormals, Inf and all NaN included."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def random_patterns(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Return random bits: all exponents are equally likely, Inf and NaN occur."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(bits)
    values = torch.randint(limits.min, limits.max + 1, shape, generator=generator)
    return values.to(bits).view(dtype)


def normal(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
    """Return weights as models have them, standard deviation 0.02."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.02).to(dtype)


def per_row(rows: int, largest: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, generator=generator) * largest + largest / 100


def assert_same_codes(
    w: torch.Tensor, amax: float | torch.Tensor, scale: float | torch.Tensor
) -> None:
    from hswq import kernels

    codes = kernels.quantize_e4m3(w, amax, scale, backend="triton")
    expected = kernels.quantize_e4m3(w, amax, scale, backend="reference")
    assert codes.shape == w.shape
    wrong = (codes != expected).nonzero()
    assert not len(wrong), f"{len(wrong)} wrong codes with scale {scale}, first at {wrong[0]}"


def assert_same_values(
    codes: torch.Tensor, scale: float | torch.Tensor, dtype: torch.dtype
) -> None:
    from hswq import kernels

    values = kernels.dequantize_e4m3(codes, scale, dtype, backend="triton")
    expected = kernels.dequantize_e4m3(codes, scale, dtype, backend="reference")
    assert values.dtype == dtype
    assert values.shape == codes.shape
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    same = (values.view(bits) == expected.view(bits)) | (values.isnan() & expected.isnan())
    assert same.all(), f"{(~same).sum()} wrong values with scale {scale} in {dtype}"


def check_quantize_of_all_float16_values() -> None:
    """A float16 weight would get another byte than the reference gives it."""
    w = all_patterns(torch.float16)
    assert_same_codes(w, NO_CLIP, 1.0)
    assert_same_codes(w, NO_CLIP, 0.0123)
    assert_same_codes(w, 0.07, 0.07 / 448)


def check_quantize_of_all_bfloat16_values() -> None:
    """A bfloat16 weight would get another byte than the reference gives it."""
    w = all_patterns(torch.bfloat16)
    assert_same_codes(w, NO_CLIP, 1.0)
    assert_same_codes(w, NO_CLIP, 0.0123)
    assert_same_codes(w, 0.07, 0.07 / 448)


def check_quantize_at_midpoints() -> None:
    """Ties would not go to the even code, or a value beside a tie to the wrong side."""
    from hswq.formats.e4m3 import e4m3_magnitudes

    magnitudes = e4m3_magnitudes()
    # 464 is where 448 would end and NaN begin; it saturates.
    ties = torch.cat(((magnitudes[1:] + magnitudes[:-1]) / 2, torch.tensor([464.0]))).float()
    for scale in SCALES[:4]:
        values = ties * torch.tensor(scale)
        below = values.nextafter(torch.tensor(0.0))
        above = values.nextafter(torch.tensor(torch.inf))
        around = torch.cat((below, values, above))
        assert_same_codes(torch.cat((around, -around)), NO_CLIP, scale)


def check_quantize_of_random_float32_bits() -> None:
    """The division or the clipping would differ somewhere in float32's whole range."""
    w = random_patterns(1 << 13)
    for scale in SCALES:
        assert_same_codes(w, NO_CLIP, scale)
        assert_same_codes(w, 1e-3, scale)


def check_quantize_beyond_the_range() -> None:
    """A large weight would become NaN instead of 448, or lose its sign."""
    from hswq import kernels

    w = torch.tensor([448.0, 465.0, 1e4, torch.inf, torch.nan])
    codes = kernels.quantize_e4m3(torch.cat((w, -w)), NO_CLIP, 1.0, backend="triton")
    assert codes.tolist() == [0x7E, 0x7E, 0x7E, 0x7E, 0x7F, 0xFE, 0xFE, 0xFE, 0xFE, 0xFF]


def check_quantize_with_amax_zero() -> None:
    """A layer of zeros would get other bytes than zeros with the signs of its weights."""
    from hswq import kernels

    w = torch.tensor([0.0, 0.5, torch.inf, -0.0, -0.5, -torch.inf])
    codes = kernels.quantize_e4m3(w, 0.0, 1.0, backend="triton")
    assert codes.tolist() == [0, 0, 0, 0x80, 0x80, 0x80]
    for dtype in DTYPES:
        assert_same_codes(random_patterns(999, dtype=dtype), 0.0, 1.0)


def check_quantize_per_row() -> None:
    """A row would be rounded with the amax or the scale of another row."""
    shapes = [(1, 4097), (31, 127), (127, 31), (9, 2048), (33, 4, 3, 3), (65,)]
    for dtype in DTYPES:
        for shape in shapes:
            w = normal(*shape, dtype=dtype)
            amax = per_row(shape[0], 0.06)
            assert_same_codes(w, amax, amax / torch.tensor(448.0))
        assert_same_codes(normal(31, 127, dtype=dtype), 0.03, per_row(31, 1e-4))
        assert_same_codes(normal(31, 127, dtype=dtype), per_row(31, 0.06), 1e-4)


def check_quantize_writes_nothing_outside() -> None:
    """A tail that is not masked would overwrite memory of another tensor."""
    from hswq.kernels.triton_backend.quantize import launch_tiles, quantize_e4m3_kernel

    guard, poison = 4096, 0xAA
    one, half = torch.tensor(1.0), torch.tensor(0.5)
    for size in (1, 127, 2047, 2048, 2049):
        for rows in (1, 3):
            memory = torch.full((2 * guard + rows * size,), poison, dtype=torch.uint8)
            codes = memory[guard:-guard].view(rows, size)
            # 0.25 has the code 0x28, so that every byte inside changes.
            w = torch.full((rows, size), 0.25)
            scale = one if rows == 1 else one.expand(rows)
            launch_tiles(quantize_e4m3_kernel, w, codes, half, scale)
            assert (codes == 0x28).all()
            assert (memory[:guard] == poison).all()
            assert (memory[-guard:] == poison).all()


def check_quantize_of_views() -> None:
    """A weight that is a view would be read in the wrong order or from the wrong place."""
    w = normal(48, 66)
    amax, scale = 0.05, 0.05 / 448
    assert_same_codes(w.T, amax, scale)
    assert_same_codes(w[:, 1::2], amax, scale)
    assert_same_codes(w[5:, :], amax, scale)
    assert_same_codes(w.flatten()[1:], amax, scale)
    assert_same_codes(w[:1].expand(7, -1), amax, per_row(7, 1e-4))
    image = normal(6, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    assert_same_codes(image, per_row(6, 0.06), scale)
    assert_same_codes(torch.tensor(0.3), amax, scale)


def check_dequantize_of_all_codes() -> None:
    """A codepoint would come back as another value than the table's."""
    codes = torch.arange(256, dtype=torch.uint8)
    for dtype in DTYPES:
        for scale in SCALES:
            assert_same_values(codes, scale, dtype)


def check_dequantize_rounds_to_nearest() -> None:
    """The product would be truncated to the 16-bit type, as the interpreter's own cast does."""
    codes = torch.arange(256, dtype=torch.uint8).expand(64, -1)
    for dtype in DTYPES:
        assert_same_values(codes, per_row(64, 1e-2), dtype)
        # From float16's subnormals to beyond its largest value.
        assert_same_values(codes, torch.logspace(-12, 6, 64, dtype=torch.float32), dtype)


def check_dequantize_shapes_and_views() -> None:
    """A row would get the scale of another, or a tail or view would be read wrongly."""
    generator = torch.Generator().manual_seed(0)
    for shape in [(1, 4097), (31, 127), (127, 31), (3, 2049), (33, 4, 3, 3), (65,)]:
        codes = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
        for dtype in DTYPES:
            assert_same_values(codes, 0.0123, dtype)
            assert_same_values(codes, per_row(shape[0], 1e-4), dtype)
    codes = torch.randint(0, 256, (48, 66), generator=generator).to(torch.uint8)
    assert_same_values(codes.T, per_row(66, 1e-4), torch.bfloat16)
    assert_same_values(codes[:, 1::2], 0.0123, torch.float16)
    assert_same_values(codes.flatten()[1:], 0.0123, torch.float32)


CHECKS = {name: value for name, value in list(globals().items()) if name.startswith("check_")}


def run_checks() -> dict[str, Any]:
    """Run every check; return errors and launches by check, and launches by kernel."""
    from hswq.kernels.triton_backend import KERNELS

    launches = Counter({kernel.function.__name__: 0 for kernel in KERNELS})

    def count(name: str) -> Any:
        def hook(*arguments: Any, **constants: Any) -> None:
            launches[name] += 1

        return hook

    for kernel in KERNELS:
        kernel.function.add_pre_run_hook(count(kernel.function.__name__))
    checks = {}
    for name, check in CHECKS.items():
        before = launches.total()
        error = None
        try:
            check()
        except Exception:
            error = traceback.format_exc()
        checks[name] = {"error": error, "launches": launches.total() - before}
    return {"checks": checks, "kernels": launches}


def run_python(arguments: list[str], **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What the checks found in a process with TRITON_INTERPRET=1."""
    result: dict[str, Any] = json.loads(run_python([__file__], TRITON_INTERPRET="1"))
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_interpreted_kernels_equal_the_reference(name: str, report: dict[str, Any]) -> None:
    """The docstring of the check says what would be wrong."""
    found = report["checks"][name]
    assert found["error"] is None, f"{CHECKS[name].__doc__}\n{found['error']}"
    assert found["launches"] > 0, "no Triton kernel ran"


@pytest.mark.slow
def test_every_kernel_of_the_table_was_interpreted(report: dict[str, Any]) -> None:
    """A kernel without a check could be wrong without anybody seeing it."""
    assert report["kernels"]
    assert [name for name, launches in report["kernels"].items() if launches == 0] == []


REASON = "from hswq.kernels import triton_backend as b; import sys; "
REASON += "sys.stdout.write(f'{sorted(b.OPS)} {b.unusable_reason()}')"


def test_reason_is_given_when_triton_is_not_installed() -> None:
    """The package would fail to import where triton does not exist, on Windows for example."""
    output = run_python(["-c", f"import sys; sys.modules['triton'] = None; {REASON}"])
    assert output.startswith("[] module 'triton' cannot be imported: ")


@pytest.mark.parametrize(("interpret", "usable"), [("0", torch.cuda.is_available()), ("1", True)])
def test_reason_is_given_when_nothing_can_run_the_kernels(interpret: str, usable: bool) -> None:
    """The dispatcher would choose kernels that then fail, or refuse an interpreter that works."""
    output = run_python(["-c", REASON], TRITON_INTERPRET=interpret)
    ops, reason = output.split("] ")
    assert ops == "['dequantize_e4m3', 'quantize_e4m3'"
    assert (reason == "None") == usable
    assert usable or "no CUDA or HIP device" in reason


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run_checks()))
