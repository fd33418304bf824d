"""Error-compensated rounding of one weight from the Gram matrix of its inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hswq import kernels
from hswq.calibration import Gram

_LEAST_GAIN = 1e-3


@dataclass(frozen=True, eq=False)
class Rounded:
    """The codes of one weight, and what they cost on the calibration's inputs.

    Attributes:
        codes: uint8, shape of the weight.
        compensated: False where nearest codes were better, or the Gram matrix was unusable.
        error: sum over outputs of E[(y_q - y)^2], after the correction of the bias if there is one.
        nearest_error: the same of nearest codes.
        power: sum over outputs of E[y^2] (of its variance where the bias is corrected).
        shift: E[y - y_q] per output, float64 [O]: what to add to the bias.
        problem: why the Gram matrix was unusable; empty where it was not.
    """

    codes: Tensor
    compensated: bool
    error: float
    nearest_error: float
    power: float
    shift: Tensor
    problem: str = ""


class Factors:
    """What rounding needs of a Gram matrix, worked out once for all weights that share it.

    H = E[x x^T], less the product of the means where the bias makes up for them; damped by a share
    of its mean diagonal; columns in the order of falling diagonal (stable); U the upper Cholesky
    factor of the inverse, H^-1 = U^T U. With J the reversal of rows and columns and J H J = M M^T,
    U is the inverse of J M J. In float64 on one thread, so that the bytes do not depend on how many
    there are.

    Args:
        gram: of the inputs.
        centred: whether the bias of the layer will be corrected.
        damping: share of the mean diagonal that is added.
    """

    def __init__(self, gram: Gram, centred: bool, damping: float) -> None:
        self.problem = "" if gram.rows else "no call had finite inputs"
        rows = max(1, gram.rows)
        self.mean = gram.total / rows
        self._width = gram.matrix.shape[-1]
        # H in float32 on the device of the sums, for measuring; U and the order.
        self.blocks: list[tuple[Tensor, Tensor, Tensor]] = []
        self.device = gram.matrix.device
        with one_thread():
            for number, block in enumerate(gram.matrix):
                second = block.cpu().double() / rows
                if centred:
                    mean = self.mean[number * self._width : (number + 1) * self._width]
                    second -= torch.outer(mean, mean)
                upper, order = self._factor(second, damping)
                self.blocks.append((second.float().to(self.device), upper, order))

    def _factor(self, second: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        diagonal = second.diagonal()
        order = torch.argsort(diagonal, descending=True, stable=True)
        added = damping * float(diagonal.mean())
        identity = torch.eye(len(second), dtype=torch.float64, device="cpu")
        if not (math.isfinite(added) and added > 0.0):
            self.problem = self.problem or "its inputs are all zero or not finite"
            return identity, order
        damped = second[order][:, order]
        damped.diagonal().add_(added)
        lower, failed = torch.linalg.cholesky_ex(damped.flip((0, 1)))
        if int(failed):
            self.problem = self.problem or "its Gram matrix is not positive definite"
            return identity, order
        upper = lower.flip((0, 1))
        return torch.linalg.solve_triangular(upper, identity, upper=True), order

    def columns(self, weight: Tensor) -> Iterator[Tensor]:
        """Yield the columns of a weight that belong to each block, [O, n / blocks]."""
        flat = weight.reshape(weight.shape[0], -1)
        for start in range(0, flat.shape[1], self._width):
            yield flat[:, start : start + self._width]

    def quadratic(self, delta: Tensor) -> float:
        """Return the sum over the rows d of delta of d^T H d, delta float32 [O, n]."""
        total = 0.0
        for part, (second, _, _) in zip(self.columns(delta), self.blocks, strict=True):
            part = part.to(second.device)
            total += float((part @ second * part).double().sum())
        return total


def round_weight(
    weight: Tensor,
    factors: Factors,
    amax: float,
    scale: float,
    *,
    compensate: bool = True,
    backend: str | None = None,
) -> Rounded:
    """Round a weight to codes whose error is least on the calibration's inputs.

    Both nearest and compensated codes are made and compared by sum_o d_o^T H d_o, d the error of
    a row. Compensated ones are kept where they are better by a thousandth at least: far more than
    products in another order of summation differ, so that the choice is the same everywhere.

    Args:
        weight: floating point [O, ...], on any device.
        factors: of its inputs.
        amax: clipping threshold of nearest codes.
        scale: float32 value, 1 without a scale.
        compensate: False makes nearest codes, with their error and shift.
        backend: of the kernels.
    Source: Frantar et al., GPTQ, arXiv:2210.17323, on the E4M3 codepoints.
    """
    weight = weight.detach()
    exact = weight.float().flatten(1)
    nearest = kernels.quantize_e4m3(weight, amax, scale, backend=backend)
    best, delta = nearest, exact - _values(nearest, scale, backend)
    error = nearest_error = factors.quadratic(delta)
    if compensate and not factors.problem:
        codes = _compensated(weight, factors, scale, backend)
        other = exact - _values(codes, scale, backend)
        found = factors.quadratic(other)
        if found < error * (1.0 - _LEAST_GAIN):
            best, delta, error = codes, other, found
    return Rounded(
        codes=best.cpu(),
        compensated=best is not nearest,
        error=error,
        nearest_error=nearest_error,
        power=factors.quadratic(exact),
        shift=delta.cpu().double() @ factors.mean,
        problem=factors.problem,
    )


def _compensated(weight: Tensor, factors: Factors, scale: float, backend: str | None) -> Tensor:
    parts = [
        kernels.round_compensated(
            part.contiguous(),
            upper.to(weight.device),
            scale,
            order.to(weight.device),
            backend=backend,
        )
        for part, (_, upper, order) in zip(factors.columns(weight), factors.blocks, strict=True)
    ]
    return torch.cat(parts, 1).reshape(weight.shape)


def _values(codes: Tensor, scale: float, backend: str | None) -> Tensor:
    return kernels.dequantize_e4m3(codes, scale, backend=backend).flatten(1)


def factors_bytes(gram: Gram) -> int:
    """Return the memory that making `Factors` takes at its peak.

    Of every block H in float32 and U in float64 stay; while one is factorized, H, its damped and
    reordered copies and the factor are there in float64.
    """
    return gram.matrix.numel() * 12 + gram.matrix[0].numel() * 40


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch work on one thread inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
