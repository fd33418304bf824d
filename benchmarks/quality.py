"""Image quality at equal file bytes: the seed's choices against measured impact and compensation.

    python -m benchmarks.quality --plot docs/quality.svg
    python -m benchmarks.quality --model DIR --name flux --levers seed best
    python -m benchmarks.quality --model DIR --name flux --noise

Calibrates a checkpoint once for each kind of codes, writes a file for every lever and budget, loads
it with hswq's own loader and paints prompts that the calibration has not seen, from noise that it
has not seen. Errors are against the unquantized checkpoint in float32: mean over all images, with
the half width of the 95 % interval over the prompts. Seed and best paint the same prompts from the
same noise, so that they are also compared prompt by prompt: geometric mean of the ratios, with the
95 % interval of their logarithms. The baseline is the seed's: the ranking by output variance,
walked and skipped as the method says, and nearest codes; what `--preset seed` writes is compared
with this module's own choice and with torch's own cast, layer by layer. The variances are hswq's
there; tests/benchmarks/test_quality.py takes them from hooks of the seed's own.

`--noise` paints with all weights of Linear and Conv2d changed at random by as much as rounding to
16 bits changes them. Images that this moves far are not the quantizer's to save.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hswq
from benchmarks.quality_tables import (
    BUDGETS,
    CALIBRATION,
    KINDS,
    LEVERS,
    MODELS,
    NOISE,
    PAINTED,
    TWINS,
    noises,
    plot,
    table,
    variations,
)
from benchmarks.record import record
from benchmarks.seed_algorithm import kept_by_variance
from hswq.calibration import Calibration
from hswq.config import BenchConfig
from hswq.driver.demo import demo_folder
from hswq.driver.sampling import prepare_sampling
from hswq.driver.source import open_source
from hswq.fast.bars import Bars
from hswq.formats.quantized import dequantize, read_scale
from hswq.formats.reader import Checkpoint
from hswq.loader import dequantize_module
from hswq.models.families import FAMILIES
from hswq.quality.bench import per_prompt
from hswq.quality.images import Painted, mean_interval, mse, paint, psnr_db, ssim

# Noise of the calibration starts from seed 0.
FIRST_SEED = 100_000
LATENT = 16


class Subject:
    """A checkpoint under test, with what it paints unquantized.

    Args:
        folder: pipeline folder that holds it as demo.safetensors or model.safetensors, and prompts
            as prompts.txt or embeddings.safetensors: the first half to calibrate, the others to
            judge.
        options: of the command line.
        scratch: folder for files of one run.
        bars: progress.
    """

    def __init__(self, folder: Path, options: argparse.Namespace, scratch: Path, bars: Bars):
        self.options, self.folder = options, folder
        names = ("demo.safetensors", "model.safetensors")
        self.checkpoint = next(folder / name for name in names if (folder / name).is_file())
        judged = self._halve(scratch)
        config = BenchConfig(samples=options.prompts, steps=options.steps, **judged)
        self.seeds = list(range(FIRST_SEED, FIRST_SEED + options.seeds))
        with open_source(self.checkpoint) as source:
            self.sampling = prepare_sampling(source, config, bars, vae=True)
        self.exact = self.sampling.denoiser

    def _halve(self, scratch: Path) -> dict[str, Any]:
        """Write both halves of the prompts and return the options of the second."""
        halves = []
        embeddings = self.folder / "embeddings.safetensors"
        if embeddings.is_file():
            tensors = load_file(embeddings)
            middle = len(tensors["prompt_embeds"]) // 2
            for name, rows in (("first", slice(middle)), ("second", slice(middle, None))):
                path = scratch / f"{name}.safetensors"
                save_file({key: rows_of[rows].clone() for key, rows_of in tensors.items()}, path)
                halves.append({"embeddings": str(path)})
        else:
            texts = (self.folder / "prompts.txt").read_text(encoding="utf-8").splitlines()
            middle = len(texts) // 2
            for name, some in (("first", texts[:middle]), ("second", texts[middle:])):
                path = scratch / f"{name}.txt"
                path.write_text("\n".join(some) + "\n", encoding="utf-8")
                halves.append({"calib_file": str(path)})
        for half in halves:
            half |= {"pipeline": str(self.folder), "latent": LATENT}
        self.calibration = halves[0]
        return halves[1]

    def paint(self, denoiser: Any, bars: Bars) -> Painted:
        """Paint all prompts with all seeds."""
        sampling, pipeline = self.sampling, self.sampling.pipeline
        name = FAMILIES[sampling.model_map.family].component
        setattr(pipeline, name, denoiser)
        try:
            return paint(
                *(pipeline, sampling.sampler, sampling.conditioning, self.options.prompts),
                self.seeds,
                steps=sampling.steps,
                guidance=sampling.guidance,
                pixels=LATENT * pipeline.vae_scale_factor,
                batch=16,
                progress=bars,
            )
        finally:
            setattr(pipeline, name, self.exact)

    def load(self, file: Path) -> Any:
        """Return the denoiser of a quantized file, decoded to float32."""
        return dequantize_module(hswq.load_quantized(copy.deepcopy(self.exact), file).float())

    def calibrate(self, target: Path, options: dict[str, Any], bars: Bars) -> None:
        """Write statistics, and codes beside them."""
        config = hswq.CalibrationConfig(**options, **self.calibration)
        hswq.calibrate_checkpoint(self.checkpoint, config, target, progress=bars)


def check_seed(subject: Subject, stats: Path, output: Path, kept: set[str], share: float) -> None:
    """Compare `--preset seed` with the seed's choice and torch's cast, both made here.

    Raises:
        AssertionError: a layer is kept by one and not by the other, or a weight differs.
    """
    calibration = Calibration.load(stats)
    units = calibration.model_map.units()
    variances = {
        unit.name: calibration.joint_sensitivity({it.name: it.shape[0] for it in unit.modules})
        for unit in units
    }
    expected = kept_by_variance(variances, {unit.name: unit.numel for unit in units}, share)
    assert kept == expected, sorted(kept ^ expected)
    with Checkpoint.open(subject.checkpoint) as source, Checkpoint.open(output) as written:
        for unit in units:
            if unit.name not in kept:
                base = unit.key.removesuffix(".weight")
                scale = read_scale(written, base)
                exact = (source.read(unit.key).float() / scale).clamp(-448, 448)
                cast = exact.to(torch.float8_e4m3fn).float() * scale
                assert torch.equal(dequantize(written, base), cast)


def variants(options: argparse.Namespace) -> Iterator[tuple[str, str, float]]:
    """Yield kind, lever and budget of every file.

    Without a budget there is nothing to rank, and one lever of several is enough.
    """
    for kind in options.kinds:
        for lever in options.levers:
            for share in options.budgets:
                if share or TWINS.get(lever) not in options.levers:
                    yield kind, lever, share


def measure(options: argparse.Namespace) -> None:
    """Calibrate, write, paint, record."""
    bars = Bars()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        subject = Subject(options.model, options, scratch, bars)
        exact = subject.paint(subject.exact, bars)
        varied = dict(options.vary)
        calibration = {**CALIBRATION, "steps": subject.sampling.steps, **varied}
        made: set[Path] = set()
        for kind, lever, share in variants(options):
            sensitivity, rounding, correction = LEVERS[lever]
            common = {"rounding": rounding, "bias_correction": correction, **KINDS[kind]}
            stats = scratch / f"{kind}-{rounding}-{correction}.safetensors"
            if stats not in made:
                levers = [LEVERS[it] for it in options.levers]
                ranked = [it for it in levers if it[1:] == (rounding, correction)]
                measured = {**common, "sensitivity": min(it[0] for it in ranked)}
                subject.calibrate(stats, {**measured, **calibration}, bars)
                made.add(stats)
            output = scratch / "quantized.safetensors"
            config = hswq.QuantizeConfig(
                **common,
                sensitivity=sensitivity,
                keep_bytes=share,
                stats=str(stats),
                pipeline=str(subject.folder),
            )
            report = hswq.quantize_checkpoint(subject.checkpoint, output, config)
            kept = {layer.name for layer in report.plan.kept}
            if lever == "seed":
                check_seed(subject, stats, output, kept, share)
            painted = subject.paint(subject.load(output), bars)
            row = {
                "kind": kind,
                "lever": lever,
                "keep_bytes": share,
                "kept": len(kept),
                "file_bytes": report.output_bytes,
                "samples": calibration["samples"],
                "calls": calibration["calls"],
                **({"varied": varied} if varied else {}),
            }
            put(subject, row, painted, exact)
    bars.close()


def measure_noise(options: argparse.Namespace) -> None:
    """Paint with weights that are changed a little at random, and record."""
    bars = Bars()
    with tempfile.TemporaryDirectory() as name:
        subject = Subject(options.model, options, Path(name), bars)
        exact = subject.paint(subject.exact, bars)
        painted = subject.paint(perturbed(subject.exact), bars)
        put(subject, {"kind": "-", "lever": "noise", "relative_change": NOISE}, painted, exact)
    bars.close()


def perturbed(denoiser: Any) -> Any:
    """Return a copy whose Linear and Conv2d weights are w (1 + u), u even in +-NOISE.

    Raises:
        ValueError: a weight is 16-bit, which most of these changes are too small for.
    """
    other = copy.deepcopy(denoiser)
    generator = torch.Generator().manual_seed(0)
    for part in other.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            if part.weight.dtype != torch.float32:
                raise ValueError(f"--noise needs float32 weights; one is {part.weight.dtype}.")
            change = torch.rand(part.weight.shape, generator=generator).mul_(2.0).sub_(1.0)
            part.weight.data.mul_(change.mul_(NOISE).add_(1.0).to(part.weight.device))
    return other


def put(subject: Subject, row: dict[str, Any], painted: Painted, exact: Painted) -> None:
    """Record a row, or print it."""
    options = subject.options
    row = {
        "op": "quality",
        "model": options.name,
        **row,
        "prompts": options.prompts,
        "seeds": options.seeds,
        "steps": subject.sampling.steps,
        **errors(painted, exact, options.prompts),
    }
    if options.dry:
        print(json.dumps(row))
    else:
        record(row)


def errors(painted: Painted, exact: Painted, prompts: int) -> dict[str, Any]:
    """Return means, intervals and medians of what lies between two sets of images."""
    image_mse = mse(painted.images, exact.images)
    figures = {
        "latent_mse": mse(painted.latents, exact.latents),
        "image_mse": image_mse,
        "psnr_db": psnr_db(image_mse),
        "ssim": ssim(painted.images, exact.images),
    }
    found = {}
    for name, values in figures.items():
        mean, width = mean_interval(values, prompts)
        found[name], found[f"{name}_ci95"] = float(f"{mean:.5g}"), float(f"{width:.3g}")
        # A few images that end up elsewhere may rule the mean.
        found[f"{name}_median"] = float(f"{float(values.median()):.5g}")
    # Those of two files are pairs: their ratios vary less than the errors do.
    means = per_prompt(figures["latent_mse"], prompts)
    found["latent_mse_per_prompt"] = [float(f"{value:.4g}") for value in means]
    return found


def variation(text: str) -> tuple[str, int | float]:
    """Parse NAME=VALUE, an option of the calibration."""
    name, _, value = text.partition("=")
    whole = ("samples", "steps", "calls", "seed", "sweeps")
    kinds = {**dict.fromkeys(whole, int), "damping": float}
    if name not in kinds or not value:
        raise argparse.ArgumentTypeError(f"{text!r}: NAME=VALUE with NAME one of {list(kinds)}.")
    return name, kinds[name](value)


def main() -> None:
    """Measure, then draw and print; --only-plot draws and prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=demo_folder(), help="pipeline folder")
    parser.add_argument("--name", choices=tuple(MODELS), default="demo", help="of the model")
    parser.add_argument("--prompts", type=int, default=PAINTED["prompts"])
    parser.add_argument("--seeds", type=int, default=PAINTED["seeds"])
    parser.add_argument("--steps", type=int, help="of the sampler; else the family's")
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--levers", nargs="+", choices=tuple(LEVERS), default=list(LEVERS))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument(
        "--vary",
        nargs="+",
        type=variation,
        default=[],
        metavar="NAME=VALUE",
        help="calibrate otherwise: samples, steps, calls, seed, sweeps or damping",
    )
    parser.add_argument("--noise", action="store_true", help="paint with weights changed at random")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--only-plot", action="store_true", help="of recorded rows")
    parser.add_argument("--dry", action="store_true", help="print rows and record nothing")
    options = parser.parse_args()
    if not options.only_plot:
        (measure_noise if options.noise else measure)(options)
    if options.plot is not None:
        plot(options.plot)
    if not options.dry:
        print("\n".join([*filter(None, map(table, MODELS)), variations(), "", noises()]))


if __name__ == "__main__":
    main()
