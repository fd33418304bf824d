"""Compensated codes of a checkpoint's layers: Gram matrices group by group, then rounding."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    GramLayer,
    SamplingRun,
    gather_grams,
    gram_groups,
    gram_layers,
)
from hswq.calibration.codes import UnitCodes
from hswq.config import CalibrationConfig
from hswq.driver.ranks import Ranks
from hswq.driver.source import Source
from hswq.driver.work import WorkFolder
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
        **config.compensation,
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
    work: WorkFolder,
    ranks: Ranks,
    progress: Progress,
) -> Path:
    """Gather Gram matrices in as many sampling runs as memory asks for, and round every layer.

    Each run gives a part, kept in the work folder; parts are shared out over the processes.

    Args:
        source: the open checkpoint, whose own weights are rounded.
        model_map: the map traced for it.
        run: the samples, with the denoiser.
        calibration: of the same samples.
        config: gram_memory, damping, sweeps, bias_correction, scaled, container and the search are
            read.
        work: the work folder.
        ranks: the processes of the run.
        progress: called with ('gram 1/G', steps …) and ('round', units …).
    Returns:
        The file of all codes, in the work folder.
    Raises:
        InputError: a file cannot be written.
        RankError: another process has ended.
    """
    job = _Rounding(source, model_map, calibration, config)
    target = work.path / "codes.safetensors"
    work.drop_damaged("codes*", job.check)
    ranks.exchange(work.path, "codes*")
    finished = target.is_file()
    missing = [] if finished else job.missing(work.parts("codes-*"))
    ranks.wait()
    if finished:
        return target
    # All divide alike, whose GPU may have more or less free.
    memory = ranks.least(gram_memory(config.gram_bytes, run.device))
    tasks = deque(ranks.share(_tasks(missing, run, calibration, memory, ranks.size)))
    done, total = 0, sum(len(units) for units, _ in tasks)
    number, count = 1, len(tasks)
    while tasks:
        units, layers = tasks.popleft()
        try:
            grams: dict[str, Gram] = {}
            if layers:
                with gather_grams(
                    run.denoiser, layers, config.backend, guidance=run.halves_guidance
                ) as grams:
                    run.sample(run.indices, f"gram {number}/{count}", progress)
            # Units are disjoint, so that the first of them names the part.
            path = work.path / f"codes-{job.number(units[0]):05}.safetensors"
            with job.writer(path, units) as part:
                for position, (unit, rounded) in enumerate(job.round_all(units, grams), 1):
                    part.write(unit.key, *rounded)
                    progress("round", done + position, total)
                part.commit()
            done += len(units)
            number += 1
            continue
        except torch.OutOfMemoryError as error:
            if len(layers) < 2:
                raise
            logger.warning(
                "%d Gram matrices are too many for the GPU (%s): they are gathered in halves",
                len(layers),
                str(error).splitlines()[0],
            )
        # Outside of the block, whose error holds what filled the memory.
        del grams
        tasks.extendleft(reversed(_halves(units, layers)))
        count += 1
    ranks.exchange(work.path, "codes-*")
    if ranks.is_first:
        job.join(work.parts("codes-*"), target)
    ranks.exchange(work.path, target.name)
    if job.unusable:
        logger.warning(
            "%d layers are rounded to nearest, since %s: %s",
            len(job.unusable),
            next(iter(job.unusable.values())),
            ", ".join(list(job.unusable)[:10]),
        )
    return target


# Units, and the layers whose Gram matrices serve them.
_Task = tuple[list[Unit], list[GramLayer]]


def _tasks(
    units: Sequence[Unit],
    run: SamplingRun,
    calibration: Calibration,
    memory: int,
    processes: int,
) -> list[_Task]:
    """Divide units by the sampling runs that give their Gram matrices; at least one a process."""
    wanted = {unit.modules[0].name: unit for unit in units}
    watched = [
        layer
        for layer in gram_layers(run.denoiser, calibration.shared_inputs)
        if any(name in wanted for name in layer.sharing)
    ]
    whole = sum(layer.nbytes for layer in watched)
    groups = gram_groups(watched, min(memory, -(-whole // processes)))
    tasks = [_served(units, group) for group in groups]
    served = {unit.key for members, _ in tasks for unit in members}
    # Grouped convolutions have no Gram matrix.
    if rest := [unit for unit in units if unit.key not in served]:
        tasks.append((rest, []))
    return tasks


def _served(units: Sequence[Unit], layers: list[GramLayer]) -> _Task:
    names = {name for layer in layers for name in layer.sharing}
    return [unit for unit in units if unit.modules[0].name in names], layers


def _halves(units: Sequence[Unit], layers: list[GramLayer]) -> list[_Task]:
    middle = len(layers) // 2
    return [_served(units, layers[:middle]), _served(units, layers[middle:])]


# What a weight becomes: codes, scale, corrected bias, and the figures that are kept of it.
_Written = tuple[Tensor, float, "Tensor | None", UnitCodes]


class _Rounding:
    """Rounds the units of one checkpoint."""

    def __init__(
        self,
        source: Source,
        model_map: ModelMap,
        calibration: Calibration,
        config: CalibrationConfig,
    ) -> None:
        self._source = source
        self._calibration = calibration
        self._config = config
        self._units = {unit.key: unit for unit in model_map.units()}
        self._biases = {
            key: bias
            for key, unit in self._units.items()
            if config.bias_correction and (bias := bias_key(model_map, unit)) is not None
        }
        self.unusable: dict[str, str] = {}

    def number(self, unit: Unit) -> int:
        """Return the place of a unit among all of them."""
        return list(self._units).index(unit.key)

    def missing(self, parts: Iterable[Path]) -> list[Unit]:
        """Return the units that no part holds."""
        done: set[str] = set()
        for path in parts:
            with Codes(path) as part:
                done |= set(part.units)
        return [unit for key, unit in self._units.items() if key not in done]

    def writer(self, path: Path, units: Iterable[Unit]) -> CodesWriter:
        """Return a writer of a file of some units' codes."""
        shapes = {unit.key: unit.shape for unit in units}
        return CodesWriter(
            path,
            shapes,
            [key for key in self._biases if key in shapes],
            self._calibration.fingerprint or "",
            self._calibration.run_settings(),
            codes_options(self._config),
        )

    def check(self, path: Path) -> None:
        """Refuse a part that was made from another checkpoint, or otherwise.

        Raises:
            InputError: it was.
            FormatError: it is damaged.
        """
        with Codes(path) as part:
            found = part.fingerprint, part.settings, part.options
        calibration = self._calibration
        wanted = (
            calibration.fingerprint or "",
            calibration.run_settings(),
            codes_options(self._config),
        )
        if json.loads(json.dumps(found)) != json.loads(json.dumps(wanted)):
            raise InputError(
                f"{path} was made from another checkpoint or with other options: it cannot be "
                f"joined with the others. Delete {path.parent} to start anew."
            )

    def join(self, parts: Sequence[Path], target: Path) -> None:
        """Make the file of all units from those of some.

        Raises:
            InputError: one was made from another checkpoint, or otherwise.
            FormatError: one is damaged.
        """
        for path in parts:
            self.check(path)
        if len(parts) == 1:
            parts[0].replace(target)
            return
        with self.writer(target, self._units.values()) as whole:
            for path in parts:
                with Codes(path) as part:
                    for key, figures in part.units.items():
                        bias = part.bias(key)
                        whole.write(key, part.read(key), part.scale(key), bias, figures)
            whole.commit()
        for path in parts:
            path.unlink()

    def round_all(
        self, units: Sequence[Unit], grams: dict[str, Gram]
    ) -> Iterator[tuple[Unit, _Written]]:
        """Round units, several at a time: those that share a Gram matrix together.

        Factorizing runs on one thread, so that its bytes do not depend on their number; what is
        left of the threads takes other matrices, as far as these and what is made of them fit into
        the memory for Gram matrices. It grows as matrices are done, which are then freed.

        Args:
            units: to round.
            grams: Gram matrices by layer; emptied.
        """
        tasks = self._sharing(units, grams)
        grams.clear()
        held = {id(gram): gram.matrix.nbytes for gram, _ in tasks if gram is not None}
        room = self._config.gram_bytes - sum(held.values())
        threads = torch.get_num_threads()
        # With each, what it will have freed: the matrix itself with the last of its tasks.
        waiting: deque[tuple[int, Future[list[tuple[Unit, _Written]]]]] = deque()
        # torch counts threads per thread.
        pool = ThreadPoolExecutor(threads, "round", torch.set_num_threads, (1,))
        with one_thread(), pool:
            while tasks or waiting:
                while tasks and len(waiting) < threads:
                    cost = 0 if tasks[0][0] is None else factors_bytes(tasks[0][0])
                    if waiting and cost > room:
                        break
                    own, task = id(tasks[0][0]), tasks.popleft()
                    freed = cost
                    if all(id(other) != own for other, _ in tasks):
                        freed += held.pop(own, 0)
                    room -= cost
                    waiting.append((freed, pool.submit(self._round_shared, *task)))
                    del task
                freed, future = waiting.popleft()
                yield from future.result()
                room += freed

    def _sharing(
        self, units: Sequence[Unit], grams: Mapping[str, Gram]
    ) -> deque[tuple[Gram | None, list[Unit]]]:
        """Return which units share a Gram matrix, and their mean inputs or not."""
        shared: dict[tuple[int, bool], tuple[Gram | None, list[Unit]]] = {}
        for unit in units:
            gram = grams.get(unit.modules[0].name)
            own = id(unit) if gram is None else id(gram)
            key = own, unit.key in self._biases
            shared.setdefault(key, (gram, []))[1].append(unit)
        return deque(shared.values())

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
                shift=torch.zeros(len(weight), dtype=torch.float64, device="cpu"),
                problem="it is a grouped convolution, which has no Gram matrix of its own",
            )
        else:
            weight = weight.to(factors.device)
            rounded = round_weight(
                weight, factors, amax, scale, sweeps=config.sweeps, backend=config.backend
            )
        if unit.key in self._biases:
            exact = checkpoint.read(self._biases[unit.key])
            # As the file will have it, so that impact is measured of no other.
            bias = (exact.double() + rounded.shift).to(exact.dtype).float()
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
