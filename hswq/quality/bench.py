"""Denoisers of one model compared by what they predict and by what they paint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hswq.calibration import Call, Recorder
from hswq.errors import InputError
from hswq.quality.images import Painted, mean_interval, mse, psnr_db, ssim

# Name, whether more is better, and what it is.
METRICS = {
    "noise_error": (
        False,
        "relative squared error of the denoiser's output along the unquantized trajectory",
    ),
    "latent_mse": (False, "mean squared difference of the final latents"),
    "image_mse": (False, "mean squared difference of the images, range 0 to 1"),
    "psnr_db": (True, "10 log10(1 / image_mse)"),
    "ssim": (True, "structural similarity, window 7 x 7, range 1, mean of the channels"),
    "lpips": (False, "LPIPS (AlexNet)"),
}


@dataclass(eq=False)
class Entry:
    """One candidate against the unquantized model.

    Attributes:
        name: how it is called.
        file_bytes: size of its file; predicted for the naive cast, which has none.
        options: what its file says of how it was made.
        values: by metric one number a pair of prompt and seed; noise_error one a call.
        painted: its images.
        has_file: False for what was made for the comparison alone.
    """

    name: str
    file_bytes: int
    options: dict[str, Any]
    values: dict[str, Tensor]
    painted: Painted
    has_file: bool = True

    def means(self, prompts: int) -> dict[str, tuple[float, float]]:
        """Return mean and half width of the 95 % interval of every metric."""
        return {
            # Calls are few and far between: each counts as an observation.
            name: mean_interval(each, len(each) if name == "noise_error" else prompts)
            for name, each in self.values.items()
        }


@dataclass(eq=False)
class Bench:
    """The result of a comparison.

    Attributes:
        model: name of the unquantized checkpoint.
        settings: sampler, steps and the like.
        prompts: that were painted.
        seeds: with which each was painted.
        exact: what the unquantized model painted.
        entries: the candidates.
    """

    model: str
    settings: dict[str, Any]
    prompts: list[str]
    seeds: list[int]
    exact: Painted
    entries: list[Entry] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-ready data, without images; infinite figures become None."""
        return {
            "model": self.model,
            "settings": self.settings,
            "prompts": self.prompts,
            "seeds": self.seeds,
            "metrics": {name: text for name, (_, text) in METRICS.items()},
            "entries": [self._entry(entry) for entry in self.entries],
        }

    def _entry(self, entry: Entry) -> dict[str, Any]:
        def finite(value: float) -> float | None:
            return value if math.isfinite(value) else None

        return {
            "name": entry.name,
            "file_bytes": entry.file_bytes,
            "has_file": entry.has_file,
            "options": entry.options,
            "mean": {n: finite(mean) for n, (mean, _) in entry.means(len(self.prompts)).items()},
            "ci95": {n: finite(width) for n, (_, width) in entry.means(len(self.prompts)).items()},
            "per_prompt": {
                name: [finite(value) for value in per_prompt(values, len(self.prompts))]
                for name, values in entry.values.items()
                if name != "noise_error"
            },
        }


def per_prompt(values: Tensor, prompts: int) -> list[float]:
    """Return the mean over the seeds of each prompt."""
    means: list[float] = values.double().reshape(prompts, -1).mean(1).tolist()
    return means


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Calls of the unquantized denoiser and what it answered."""

    calls: tuple[Call, ...]
    answers: tuple[Tensor, ...]

    def errors(self, denoiser: nn.Module, device: torch.device) -> Tensor:
        """Return sum (y - y0)^2 / sum y0^2 of every call, float64 [calls]."""
        found = []
        with torch.no_grad():
            for call, exact in zip(self.calls, self.answers, strict=True):
                answer = _first_tensor(call.run(denoiser, device)).double().cpu()
                found.append((answer - exact).square().sum() / exact.square().sum())
        return torch.stack(found)


@contextmanager
def following(denoiser: nn.Module, count: int) -> Iterator[Callable[[], Trajectory]]:
    """Record some calls of the unquantized denoiser while it paints.

    Yields:
        What gives the trajectory once the block's work is done; the denoiser answers again.
    """
    recorder = Recorder(count)
    handle = recorder.attach(denoiser)

    def trajectory() -> Trajectory:
        handle.remove()
        device = next(denoiser.parameters()).device
        calls = recorder.records()
        with torch.no_grad():
            answers = tuple(_first_tensor(it.run(denoiser, device)).double().cpu() for it in calls)
        return Trajectory(calls, answers)

    try:
        yield trajectory
    finally:
        handle.remove()


def measure(
    painted: Painted, exact: Painted, perceptual: Callable[[Tensor, Tensor], Tensor] | None
) -> dict[str, Tensor]:
    """Return the metrics of images, one number a pair."""
    image_mse = mse(painted.images, exact.images)
    values = {
        "latent_mse": mse(painted.latents, exact.latents),
        "image_mse": image_mse,
        "psnr_db": psnr_db(image_mse),
        "ssim": ssim(painted.images, exact.images),
    }
    if perceptual is not None:
        values["lpips"] = perceptual(painted.images, exact.images)
    return values


def perceptual_distance() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return LPIPS where the package is installed and its network's weights are on this machine.

    They are never fetched.
    """
    weights = Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth"
    if not weights.is_file():
        return None
    try:
        import lpips
    except ImportError:
        return None
    network = lpips.LPIPS(net="alex", verbose=False).eval()

    def distance(ours: Tensor, theirs: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = network(ours * 2 - 1, theirs * 2 - 1).flatten().double()
        return found

    return distance


def check_images(pixels: int) -> None:
    """Refuse images too small for the metrics.

    Raises:
        InputError: SSIM's window is larger than the image, or scikit-image is not installed.
    """
    if pixels < 7:
        raise InputError(f"images of {pixels} pixels are smaller than SSIM's window of 7.")
    try:
        import skimage.metrics  # noqa: F401
    except ImportError as error:
        raise InputError("bench needs scikit-image: pip install 'hswq[bench]'.") from error


def _first_tensor(output: Any) -> Tensor:
    """Return what a denoiser predicts: a tensor, or one an image, put together."""
    while not isinstance(output, Tensor):
        output = output[0] if not isinstance(output, dict) else next(iter(output.values()))
        if isinstance(output, list):
            return torch.stack(output)
    return output
