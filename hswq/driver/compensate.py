"""Compensated codes of a checkpoint's layers: Gram matrices group by group, then rounding."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hswq import kernels
from hswq.calibration import (
    Calibration,
    Codes,
    CodesWriter,
    Gram,
    SamplingRun,
    gather_grams,
    gram_groups,
    gram_layers,
)
from hswq.calibration.codes import UnitCodes
from hswq.config import CalibrationConfig
from hswq.driver.source import Source
from hswq.errors import InputError
from hswq.formats.containers import can_scale
from hswq.formats.e4m3 import E4M3_MAX
from hswq.models.map import ModelMap, Unit
from hswq.plan import Part
from hswq.progress import Progress
from hswq.search import AmaxResult, search_amax
from hswq.search.compensated import Factors, Rounded, factors_bytes, one_thread, round_weight

logger = logging.getLogger(__name__)


def codes_options(config: CalibrationConfig) -> dict[str, Any]:
    """Return the options that compensated codes depend on."""
    bins, candidates, refinements = config.search_settings
    return {
        "scaled": config.scaled,
        "container": config.container if config.scaled else None,
        "bias_correction": config.bias_correction,
        "damping": config.damping,
        "bins": bins,
        "candidates": candidates,
        "refinements": refinements,
    }


def gram_memory(allowed: int, device: torch.device) -> int:
    """Return the memory for Gram matrices: what is allowed, on a GPU at most half of what is free.

    The other half is the sampler's. How layers are grouped changes no code.
    """
    if device.type != "cuda":
        return allowed
    free, _ = torch.cuda.mem_get_info(device)
    return min(allowed, free // 2)


def write_codes(
    source: Source,
    model_map: ModelMap,
    run: SamplingRun,
    calibration: Calibration,
    config: CalibrationConfig,
    path: Path,
    progress: Progress,
) -> None:
    """Gather Gram matrices in as many sampling runs as memory asks for, and round every layer.

    Args:
        source: the open checkpoint, whose own weights are rounded.
        model_map: the map traced for it.
        run: the samples, with the denoiser.
        calibration: of the same samples.
        config: gram_memory, damping, bias_correction, scaled, container and the search are read.
        path: the file of codes to write.
        progress: called with ('gram 1/G', steps …) and ('round', units …).
    Raises:
        InputError: the file cannot be written.
    """
    units = {unit.key: unit for unit in model_map.units()}
    watched = gram_layers(run.denoiser, calibration.shared_inputs)
    groups = gram_groups(watched, gram_memory(config.gram_bytes, run.denoiser.device))
    group_of = {
        name: number
        for number, group in enumerate(groups)
        for layer in group
        for name in layer.sharing
    }
    biases = {
        key: bias
        for key, unit in units.items()
        if config.bias_correction and (bias := bias_key(model_map, unit)) is not None
    }
    writer = CodesWriter(
        path,
        {key: unit.shape for key, unit in units.items()},
        biases,
        calibration.fingerprint or "",
        calibration.run_settings(),
        codes_options(config),
    )
    job = _Rounding(source, calibration, config, biases)
    done = 0
    with writer:
        for number, group in enumerate([*groups, []]):
            members = [
                unit
                for unit in units.values()
                # Grouped convolutions have no Gram matrix; they come last.
                if group_of.get(unit.modules[0].name, len(groups)) == number
            ]
            grams: dict[str, Gram] = {}
            if group:
                with gather_grams(run.denoiser, group, config.backend) as grams:
                    run.all_samples(f"gram {number + 1}/{len(groups)}", progress)
            for unit, rounded in job.round_all(members, grams):
                writer.write(unit.key, *rounded)
                done += 1
                progress("round", done, len(units))
        writer.commit()
    if job.unusable:
        logger.warning(
            "%d layers are rounded to nearest, since %s: %s",
            len(job.unusable),
            next(iter(job.unusable.values())),
            ", ".join(list(job.unusable)[:10]),
        )


# What a weight becomes: codes, scale, corrected bias, and the figures that are kept of it.
_Written = tuple[Tensor, float, "Tensor | None", UnitCodes]


class _Rounding:
    """Rounds the units of one checkpoint."""

    def __init__(
        self,
        source: Source,
        calibration: Calibration,
        config: CalibrationConfig,
        biases: Mapping[str, str],
    ) -> None:
        self._source = source
        self._calibration = calibration
        self._config = config
        self._biases = biases
        self.unusable: dict[str, str] = {}

    def round_all(
        self, units: Sequence[Unit], grams: Mapping[str, Gram]
    ) -> Iterator[tuple[Unit, _Written]]:
        """Round units, several at a time: those that share a Gram matrix together.

        Factorizing runs on one thread, so that its bytes do not depend on their number; what is
        left of the threads takes other matrices, as far as these fit into the memory for Gram
        matrices once more.
        """
        shared: dict[tuple[int, bool], tuple[Gram | None, list[Unit]]] = {}
        for unit in units:
            gram = grams.get(unit.modules[0].name)
            own = id(unit) if gram is None else id(gram)
            key = own, unit.key in self._biases
            shared.setdefault(key, (gram, []))[1].append(unit)
        tasks = deque(shared.values())
        needed = max((factors_bytes(gram) for gram, _ in tasks if gram is not None), default=1)
        threads = torch.get_num_threads()
        workers = max(1, min(threads, self._config.gram_bytes // needed))
        waiting: deque[Future[list[tuple[Unit, _Written]]]] = deque()
        # torch counts threads per thread.
        pool = ThreadPoolExecutor(workers, "round", torch.set_num_threads, (1,))
        with one_thread(), pool:
            while tasks or waiting:
                while tasks and len(waiting) < workers:
                    waiting.append(pool.submit(self._round_shared, *tasks.popleft()))
                yield from waiting.popleft().result()

    def _round_shared(
        self, gram: Gram | None, units: Sequence[Unit]
    ) -> list[tuple[Unit, _Written]]:
        centred = units[0].key in self._biases
        factors = None if gram is None else Factors(gram, centred, self._config.damping)
        return [(unit, self._round(unit, factors)) for unit in units]

    def _round(self, unit: Unit, factors: Factors | None) -> _Written:
        checkpoint, config = self._source.checkpoint, self._config
        weight = checkpoint.read(unit.key)
        scaled = config.scaled and can_scale(config.container, unit.kind)
        result = self._search(unit, weight, scaled)
        amax, scale = (result.amax, result.scale) if scaled else (E4M3_MAX, 1.0)
        bias = None
        if factors is None:
            codes = kernels.quantize_e4m3(weight, amax, scale, backend=config.backend)
            rounded = Rounded(
                *(codes, False, 0.0, 0.0, 0.0),
                shift=torch.zeros(len(weight), dtype=torch.float64),
                problem="it is a grouped convolution, which has no Gram matrix of its own",
            )
        else:
            weight = weight.to(factors.device)
            rounded = round_weight(weight, factors, amax, scale, backend=config.backend)
        if unit.key in self._biases:
            exact = checkpoint.read(self._biases[unit.key])
            bias = (exact.double() + rounded.shift).to(torch.float32)
        if rounded.problem:
            self.unusable[unit.name] = rounded.problem
        figures = UnitCodes(
            *(result.amax, result.mse, result.max_abs, result.power),
            *(scaled, rounded.compensated),
            *(rounded.error, rounded.nearest_error, rounded.power),
        )
        return rounded.codes, scale, bias, figures

    def _search(self, unit: Unit, weight: Tensor, scaled: bool) -> AmaxResult:
        bins, candidates, refinements = self._config.search_settings
        return search_amax(
            weight,
            self._calibration.importance(unit.modules[0].name),
            scaled=scaled,
            bins=bins,
            candidates=candidates,
            refinements=refinements,
            backend=self._config.backend,
            name=f"layer {unit.name!r} ({unit.key})",
        )


def bias_key(model_map: ModelMap, unit: Unit) -> str | None:
    """Return the checkpoint's key of a unit's bias, whose rows are those of the weight.

    None where a layer of the unit has no bias, or one that lies elsewhere.
    """
    key = unit.key.removesuffix(".weight") + ".bias"
    if not unit.key.endswith(".weight") or model_map.shapes.get(key) != unit.shape[:1]:
        return None
    for module in unit.modules:
        rows = [
            [(part.key, part.start, part.stop) for part in model_map.sources.get(name, ())]
            for name in (f"{module.name}.weight", f"{module.name}.bias")
        ]
        if [(key, start, stop) for _, start, stop in rows[0]] != rows[1]:
            return None
    return key


class RoundedParts:
    """Gives the units of a denoiser with the codes of a file."""

    def __init__(self, codes: Codes, model_map: ModelMap) -> None:
        self._codes = codes
        self._map = model_map
        self._units = {unit.modules[0].name: unit for unit in model_map.units()}

    def __call__(self, unit: Sequence[str]) -> list[Part]:
        """Return what the layers of a unit become."""
        key = self._units[unit[0]].key
        values = kernels.dequantize_e4m3(self._codes.read(key), self._codes.scale(key))
        bias = self._codes.bias(key)
        parts = []
        for name in dict.fromkeys(unit):
            rows = [
                torch.arange(source.start, source.stop)
                for source in self._map.sources[f"{name}.weight"]
            ]
            chosen = torch.cat(rows)
            parts.append(Part(name, values[chosen], None if bias is None else bias[chosen]))
        return parts


def check_codes(codes: Codes, calibration: Calibration, config: CalibrationConfig) -> None:
    """Refuse codes of another checkpoint, calibration or kind of file.

    Raises:
        InputError: they do not belong to these statistics, or were made with other options.
    """
    expected = calibration.fingerprint, calibration.run_settings()
    if (codes.fingerprint, codes.settings) != expected:
        raise InputError(
            f"{codes.path} does not belong to these statistics: it was made from another "
            "checkpoint or calibration. Calibrate again with --rounding compensated."
        )
    wanted = codes_options(config)
    differing = sorted(name for name in wanted if codes.options.get(name) != wanted[name])
    if differing:
        raise InputError(
            f"{codes.path} was made with other options ({', '.join(differing)}): it holds "
            f"{codes.options}, and {wanted} is asked for. Calibrate again with the options of the "
            "file that is to be written, write it with those of the codes, or round to the nearest "
            "codes with --rounding nearest."
        )
