"""JSON lines of benchmark results, one file a machine."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine_name() -> str:
    """Return a short name of this machine: processor, its family and model, core count.

    Virtual machines give processors of several generations one name.
    """
    known = {"model name": platform.processor() or platform.machine()}
    info = Path("/proc/cpuinfo")
    if info.exists():
        # The first processor's lines.
        for line in info.read_text().partition("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            known[key.strip()] = value.strip()
    words = [known["model name"]]
    if "cpu family" in known:
        words.append(f"family {known['cpu family']} model {known['model']}")
    return re.sub(r"[^a-z0-9]+", "-", " ".join([*words, f"x{os.cpu_count()}"]).lower())


def commit_name() -> str:
    """Return the short commit of the tree that is measured, with + where it has changes.

    The rows that a run has added are none. 'unknown' outside of a clone.
    """
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", ":/", ":!results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def print_row(row: dict[str, Any]) -> str:
    """Print one result with date, commit and versions, and return the line."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    facts = {"date": date, "commit": commit_name(), "torch": torch.__version__}
    line = json.dumps({**row, **facts})
    print(line, flush=True)
    return line


def record(row: dict[str, Any]) -> None:
    """Print one result and append it to this machine's file."""
    line = print_row(row)
    with open(RESULTS / f"{machine_name()}.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
