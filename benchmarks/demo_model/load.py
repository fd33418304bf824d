"""The shipped demo checkpoint as a diffusers pipeline."""

from __future__ import annotations

from typing import Any

import torch

from hswq.driver.demo import demo_folder
from hswq.formats.reader import Checkpoint
from hswq.models.detect import detect
from hswq.models.pipeline import build_pipeline
from hswq.models.trace import trace_map


def demo_pipeline() -> Any:
    """Return the demo checkpoint's pipeline in float32."""
    folder = demo_folder()
    with Checkpoint.open(folder / "demo.safetensors") as checkpoint:
        detection = detect(checkpoint)
        return build_pipeline(
            *(checkpoint, detection, trace_map(checkpoint, detection, folder)),
            pipeline_dir=folder,
            dtype=torch.float32,
            device=torch.device("cpu"),
            vae=True,
        )
