"""Image quality at equal file bytes: the seed's choices against measured impact and compensation.

    python -m benchmarks.quality --plot docs/quality.svg

Calibrates a checkpoint once for each kind of codes, writes a file for every lever and budget, loads
it with hswq's own loader and paints prompts that the calibration has not seen, from noise that it
has not seen. Errors are against the unquantized checkpoint in float32: mean over all images, with
the half width of the 95 % interval over the prompts. The baseline is the seed's: the ranking by
output variance, walked and skipped as the method says, and nearest codes; what `--preset seed`
writes is compared with this module's own choice and with torch's own cast, layer by layer.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import hswq
from benchmarks.record import RESULTS, machine_name, record
from benchmarks.seed_algorithm import kept_by_variance
from hswq.calibration import Calibration
from hswq.driver.demo import demo_folder
from hswq.fast.bars import Bars
from hswq.formats.quantized import dequantize
from hswq.formats.reader import Checkpoint
from hswq.loader import dequantize_module
from hswq.models.detect import detect
from hswq.models.families import FAMILIES
from hswq.models.pipeline import build_pipeline
from hswq.models.trace import trace_map
from hswq.quality.images import Painted, mean_interval, mse, paint, psnr_db, ssim

BUDGETS = (0.0, 0.05, 0.10, 0.25)
# Levers: sensitivity, rounding, bias correction; the first is the seed's, the last `best`.
LEVERS = {
    "seed": ("variance", "nearest", False),
    "impact": ("impact", "nearest", False),
    "compensated": ("variance", "compensated", False),
    "compensated, bias": ("variance", "compensated", True),
    "best": ("impact", "compensated", True),
}
KINDS = {"V1": {"container": "comfy"}, "V2": {"scaled": True, "container": "hswq"}}
# Noise of the calibration starts from seed 0.
FIRST_SEED = 100_000


@dataclass
class Subject:
    """A checkpoint under test, with what it paints unquantized."""

    name: str
    checkpoint: Path
    folder: Path
    calibration_prompts: Path
    prompts: list[str]
    seeds: list[int]
    steps: int
    latent: int
    calls: int

    def __post_init__(self) -> None:
        with Checkpoint.open(self.checkpoint) as checkpoint:
            detection = detect(checkpoint)
            self.sampler = FAMILIES[detection.family].sampler
            self.pipeline = build_pipeline(
                *(checkpoint, detection, trace_map(checkpoint, detection, self.folder)),
                pipeline_dir=self.folder,
                dtype=torch.float32,
                device=torch.device("cpu"),
                vae=True,
            )
        self.component = FAMILIES[detection.family].component
        self.exact = getattr(self.pipeline, self.component)
        _, self.guidance = self.sampler.defaults(self.exact.config)

    def paint(self, denoiser: Any, bars: Bars) -> Painted:
        """Paint all prompts with all seeds."""
        setattr(self.pipeline, self.component, denoiser)
        try:
            return paint(
                *(self.pipeline, self.sampler, self.prompts, self.seeds),
                steps=self.steps,
                guidance=self.guidance,
                pixels=self.latent * self.pipeline.vae_scale_factor,
                batch=16,
                progress=bars,
            )
        finally:
            setattr(self.pipeline, self.component, self.exact)

    def load(self, file: Path) -> Any:
        """Return the denoiser of a quantized file, decoded to float32."""
        return dequantize_module(hswq.load_quantized(copy.deepcopy(self.exact), file).float())

    def calibrate(self, target: Path, options: dict[str, Any], samples: int, bars: Bars) -> None:
        """Write statistics, and codes beside them."""
        config = hswq.CalibrationConfig(
            **options,
            samples=samples,
            steps=self.steps,
            latent=self.latent,
            calls=self.calls,
            calib_file=str(self.calibration_prompts),
            pipeline=str(self.folder),
        )
        hswq.calibrate_checkpoint(self.checkpoint, config, target, progress=bars)


def demo(prompts: int, seeds: int, steps: int, calls: int, folder: Path) -> Subject:
    """Return the demo checkpoint: half of its prompts to calibrate, the others to judge."""
    texts = (demo_folder() / "prompts.txt").read_text(encoding="utf-8").splitlines()
    calibration = folder / "prompts.txt"
    calibration.write_text("\n".join(texts[:32]) + "\n", encoding="utf-8")
    return Subject(
        name="demo",
        checkpoint=demo_folder() / "demo.safetensors",
        folder=demo_folder(),
        calibration_prompts=calibration,
        prompts=texts[32 : 32 + prompts],
        seeds=list(range(FIRST_SEED, FIRST_SEED + seeds)),
        steps=steps,
        latent=16,
        calls=calls,
    )


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
                exact = source.read(unit.key).float().clamp(-448, 448)
                cast = exact.to(torch.float8_e4m3fn).float()
                assert torch.equal(dequantize(written, unit.key.removesuffix(".weight")), cast)


def variants(kinds: list[str], levers: list[str]) -> Iterator[tuple[str, str, float]]:
    """Yield kind, lever and budget of every file; impact needs a budget to spend."""
    for kind in kinds:
        for lever in levers:
            for share in BUDGETS:
                if share or lever not in ("impact", "best"):
                    yield kind, lever, share


def measure(options: argparse.Namespace) -> None:
    """Calibrate, write, paint, record."""
    bars = Bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subject = demo(options.prompts, options.seeds, options.steps, options.calls, folder)
        exact = subject.paint(subject.exact, bars)
        made: set[Path] = set()
        for kind, lever, share in variants(options.kinds, options.levers):
            sensitivity, rounding, correction = LEVERS[lever]
            common = {"rounding": rounding, "bias_correction": correction, **KINDS[kind]}
            stats = folder / f"{kind}-{rounding}-{correction}.safetensors"
            if stats not in made:
                ranked = [it for it in LEVERS.values() if it[1:] == (rounding, correction)]
                measured = {**common, "sensitivity": min(it[0] for it in ranked)}
                subject.calibrate(stats, measured, options.samples, bars)
                made.add(stats)
            output = folder / "quantized.safetensors"
            config = hswq.QuantizeConfig(
                **common,
                sensitivity=sensitivity,
                keep_bytes=share,
                stats=str(stats),
                pipeline=str(subject.folder),
            )
            report = hswq.quantize_checkpoint(subject.checkpoint, output, config)
            kept = {layer.name for layer in report.plan.kept}
            if kind == "V1" and lever == "seed":
                check_seed(subject, stats, output, kept, share)
            painted = subject.paint(subject.load(output), bars)
            row = {
                "op": "quality",
                "model": subject.name,
                "kind": kind,
                "lever": lever,
                "keep_bytes": share,
                "kept": len(kept),
                "file_bytes": report.output_bytes,
                "prompts": len(subject.prompts),
                "seeds": len(subject.seeds),
                "steps": subject.steps,
                "samples": options.samples,
                "calls": options.calls,
                **errors(painted, exact, len(subject.prompts)),
            }
            if options.dry:
                print(json.dumps(row))
            else:
                record(row)
    bars.close()


def errors(painted: Painted, exact: Painted, prompts: int) -> dict[str, Any]:
    """Return means and intervals of what lies between two sets of images."""
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
    return found


def latest_rows(model: str) -> dict[tuple[str, str, float], dict[str, Any]]:
    """Return this machine's last row of every variant of a model.

    Raises:
        SystemExit: there is none.
    """
    path = RESULTS / f"{machine_name()}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = {
        (row["kind"], row["lever"], row["keep_bytes"]): row
        for row in map(json.loads, lines)
        if row["op"] == "quality" and row["model"] == model
    }
    if not rows:
        raise SystemExit(f"{path} has no rows of {model}: run `python -m benchmarks.quality`.")
    return rows


def table(model: str) -> str:
    """Return the recorded rows as the README's table."""
    rows = latest_rows(model)
    kinds = sorted({kind for kind, _, _ in rows})
    lines = ["| kept bytes | " + " | ".join(f"{k} {lever}" for k in kinds for lever in LEVERS)]
    lines[0] += " |"
    lines.append("|---|" + "---|" * (len(kinds) * len(LEVERS)))
    for share in BUDGETS:
        cells = []
        for kind in kinds:
            for lever in LEVERS:
                # Without a budget there is nothing to rank.
                twin = {"impact": "seed", "best": "compensated, bias"}.get(lever, lever)
                row = rows.get((kind, lever, share)) or rows.get((kind, twin, share))
                cells.append(
                    "-"
                    if row is None
                    else f"{row['latent_mse']:.1e} ± {row['latent_mse_ci95']:.0e}"
                )
        lines.append(f"| {share:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(model: str, path: Path) -> None:
    """Draw latent error against file size, one line a lever."""
    import matplotlib as mpl
    from matplotlib import pyplot

    # Equal rows, equal file.
    mpl.rcParams.update({"svg.hashsalt": "hswq", "svg.fonttype": "none"})
    rows = latest_rows(model)
    kinds = sorted({kind for kind, _, _ in rows})
    figure, panels = pyplot.subplots(
        1,
        len(kinds),
        figsize=(4.8 * len(kinds), 4.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, kind in zip(panels[0], kinds, strict=True):
        for lever, marker in zip(LEVERS, "osD^v", strict=True):
            found = [row for key, row in sorted(rows.items()) if key[:2] == (kind, lever)]
            axes.errorbar(
                [row["file_bytes"] / 1e6 for row in found],
                [row["latent_mse"] for row in found],
                [row["latent_mse_ci95"] for row in found],
                marker=marker,
                ms=4,
                lw=1,
                capsize=2,
                label=lever,
            )
        axes.set(yscale="log", xlabel="file, MB", title=kind)
        axes.grid(visible=True, alpha=0.3)
    panels[0][0].set_ylabel("latent MSE against the unquantized model")
    panels[0][0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def main() -> None:
    """Measure, then draw and print; --only-plot draws and prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--samples", type=int, default=32, help="of the calibration")
    parser.add_argument("--calls", type=int, default=8, help="recorded for impact")
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--levers", nargs="+", choices=tuple(LEVERS), default=list(LEVERS))
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--only-plot", action="store_true", help="of recorded rows")
    parser.add_argument("--dry", action="store_true", help="print rows and record nothing")
    options = parser.parse_args()
    if not options.only_plot:
        measure(options)
    if options.plot is not None:
        plot("demo", options.plot)
    if not options.dry:
        print(table("demo"))


if __name__ == "__main__":
    main()
