"""What a pipeline paints, and how far two sets of images are apart."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hswq.calibration import Embeddings
from hswq.models.sampler import Sampler
from hswq.progress import Progress, no_progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Painted:
    """Images of N (prompt, seed) pairs, prompts outermost.

    Attributes:
        latents: final latents, float32 [N, ...] on the CPU.
        images: float32 [N, 3, H, W] in [0, 1] on the CPU.
    """

    latents: Tensor
    images: Tensor


def paint(
    pipeline: Any,
    sampler: Sampler,
    embeddings: Embeddings,
    count: int,
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    pixels: int,
    batch: int = 8,
    phase: str = "paint",
    progress: Progress = no_progress,
) -> Painted:
    """Paint every prompt with every seed, the noise of a pair drawn on the CPU from its seed.

    Args:
        pipeline: with a VAE.
        sampler: how the family's pipeline is called.
        embeddings: of the prompts.
        count: prompts to paint, from the first on.
        seeds: of the noise.
        steps: sampler steps.
        guidance: guidance scale.
        pixels: edge of the images.
        batch: images painted together, fewer where their prompts are of different lengths or a GPU
            has too little memory.
        phase: name of the phase for `progress`.
        progress: called with (phase, images done, images in all).
    """
    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    device, dtype = next(denoiser.parameters()).device, denoiser.dtype
    latents, images = [], []
    last: dict[str, Tensor] = {}

    def keep(pipe: Any, step: int, _: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        last.update(tensors)
        return tensors

    def call(some: list[tuple[int, int]]) -> Tensor:
        samples = [embeddings.sample(prompt, device, dtype) for prompt, _ in some]
        painted: Tensor = pipeline(
            **_joined([sampler.arguments(sample, guidance) for sample in samples]),
            **sampler.guided(guidance),
            num_inference_steps=steps,
            height=pixels,
            width=pixels,
            generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in some],
            output_type="pt",
            callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=["latents"],
        ).images
        return painted

    pipeline.set_progress_bar_config(disable=True)
    pairs = [(prompt, seed) for prompt in range(count) for seed in seeds]
    done = 0
    batches = deque(_batches(pairs, embeddings, batch))
    while batches:
        some = batches.popleft()
        try:
            painted = call(some)
        except torch.OutOfMemoryError:
            if len(some) == 1:
                raise
            logger.warning("%d images are too many for the GPU: they are halved", len(some))
            torch.cuda.empty_cache()
            half = len(some) // 2
            batches.extendleft((some[half:], some[:half]))
            continue
        latents.append(last["latents"].float().cpu())
        images.append(painted.float().cpu())
        done += len(some)
        progress(phase, done, len(pairs))
    return Painted(torch.cat(latents), torch.cat(images))


def _batches(
    pairs: Sequence[tuple[int, int]], embeddings: Embeddings, size: int
) -> Iterator[list[tuple[int, int]]]:
    """Split pairs of prompt and seed, in order, where a batch is full or lengths differ."""
    batch: list[tuple[int, int]] = []
    for pair in pairs:
        same = not batch or embeddings.length(batch[0][0]) == embeddings.length(pair[0])
        if not same or len(batch) == size:
            yield batch
            batch = []
        batch.append(pair)
    yield batch


def _joined(given: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the arguments of several samples as those of one call: tensors [B, ...] or lists."""
    return {
        name: torch.cat([one[name] for one in given])
        if isinstance(first, Tensor)
        else [item for one in given for item in one[name]]
        for name, first in given[0].items()
    }


def mse(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the mean squared difference of each pair, float64 [N]."""
    difference: Tensor = ours.double() - theirs.double()
    return difference.square().flatten(1).mean(1)


def psnr_db(image_mse: Tensor) -> Tensor:
    """Return 10 log10(1 / mse) of images in [0, 1]; infinite for equal ones."""
    return -10.0 * image_mse.log10()


def ssim(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the structural similarity of each pair, float64 [N].

    Wang et al. 2004 as scikit-image computes it: window of 7 x 7, range 1, mean over the channels.

    Args:
        ours: float [N, 3, H, W] in [0, 1], H and W at least 7.
        theirs: the same shape.
    """
    from skimage.metrics import structural_similarity

    return torch.tensor(
        [
            structural_similarity(
                one.double().numpy(), other.double().numpy(), channel_axis=0, data_range=1.0
            )
            for one, other in zip(ours, theirs, strict=True)
        ],
        dtype=torch.float64,
    )


def mean_interval(values: Tensor, clusters: int) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % interval, by Student's t over prompts.

    Images of one prompt are alike, so that each prompt counts as one observation.

    Args:
        values: [N], prompts outermost.
        clusters: number of prompts.
    """
    means = values.double().reshape(clusters, -1).mean(1)
    if clusters < 2:
        return float(means.mean()), math.inf
    from scipy.stats import t

    width = float(t.ppf(0.975, clusters - 1)) * float(means.std()) / math.sqrt(clusters)
    return float(means.mean()), width
