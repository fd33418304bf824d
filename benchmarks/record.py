"""JSON lines of benchmark results, one file a machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine_name() -> str:
    """Return a short name of this machine: processor model and core count."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{model} x{os.cpu_count()}".lower().replace(" ", "-").replace("(", "").replace(")", "")


def commit_name() -> str:
    """Return the short commit of the tree that is measured, with + where it has changes.

    The rows that a run has added are none.
    """
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", ":/", ":!results")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def record(row: dict[str, Any]) -> None:
    """Print one result and append it to this machine's file, with commit and versions."""
    line = json.dumps({**row, "commit": commit_name(), "torch": torch.__version__})
    print(line)
    with open(RESULTS / f"{machine_name()}.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
