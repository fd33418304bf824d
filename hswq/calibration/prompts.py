"""What the sampler is conditioned on: prompts, one a line, or a file of prompt embeddings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hswq.errors import FormatError, InputError
from hswq.formats.dtypes import DTYPE_NAMES
from hswq.formats.reader import Checkpoint
from hswq.formats.writer import CheckpointWriter, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

# Text encoders read 77 to 512 tokens of a prompt; a longer line is not a prompt.
MAX_PROMPT_CHARACTERS = 10_000

_SHIPPED_PROMPTS = Path(__file__).with_name("prompts.txt")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_RANKS = {
    "prompt_embeds": "[N, T, C]",
    "pooled_prompt_embeds": "[N, P]",
    "negative_prompt_embeds": "[1 or N, T, C]",
    "negative_pooled_prompt_embeds": "[1 or N, P]",
}


def load_prompts(path: str | os.PathLike[str] | None = None) -> list[str]:
    """Read prompts from a UTF-8 text file, one a line.

    Blank lines and lines that begin with '#' are skipped; a byte order mark is tolerated.

    Args:
        path: the file; None reads the 128 prompts that hswq ships.
    Returns:
        At least one prompt, in file order, without surrounding white space.
    Raises:
        InputError: the file cannot be read, is not UTF-8 text, has a line over
            MAX_PROMPT_CHARACTERS, or holds no prompt.
    """
    source = _SHIPPED_PROMPTS if path is None else Path(path)
    prompts = []
    try:
        with source.open(encoding="utf-8-sig") as handle:
            # Bounded reads: a checkpoint given by mistake can be one line of many gigabytes.
            while line := handle.readline(MAX_PROMPT_CHARACTERS + 2):
                if len(line.rstrip("\n")) > MAX_PROMPT_CHARACTERS or "\0" in line:
                    raise InputError(
                        f"{source} is not a prompt file: it holds a NUL character or a line of "
                        f"more than {MAX_PROMPT_CHARACTERS} characters. Give a UTF-8 text file, "
                        "one prompt a line."
                    )
                prompt = line.strip()
                if prompt and not prompt.startswith("#"):
                    prompts.append(prompt)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source} is not UTF-8 text ({error.reason}): save it as UTF-8, one prompt a line."
        ) from error
    except OSError as error:
        raise InputError(
            f"prompt file {source} cannot be read ({error.strerror}): give a UTF-8 text file, one "
            "prompt a line."
        ) from error
    if not prompts:
        raise InputError(
            f"{source} holds no prompt: blank lines and lines that begin with '#' do not count. "
            "Write at least one prompt, one a line."
        )
    return prompts


def prompts_hash(prompts: Sequence[str]) -> str:
    """Return the SHA-256 of the prompts and their order, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Prompt embeddings of N samples: what text encoders would have answered.

    Attributes:
        prompt_embeds: [N, T, C], float16, bfloat16 or float32.
        pooled_prompt_embeds: [N, P].
        negative_prompt_embeds: [N, T, C], or [1, T, C] for all samples.
        negative_pooled_prompt_embeds: [N, P], or [1, P] for all samples.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    negative_prompt_embeds: Tensor
    negative_pooled_prompt_embeds: Tensor

    def __post_init__(self) -> None:
        tensors = self.tensors()
        for key, tensor in tensors.items():
            if tensor.dtype not in _DTYPES:
                raise InputError(
                    f"{key!r} is {tensor.dtype}; float16, bfloat16 or float32 is needed."
                )
            if tensor.ndim != _RANKS[key].count(",") + 1 or 0 in tensor.shape:
                raise InputError(
                    f"{key!r} has shape {list(tensor.shape)}; {_RANKS[key]} with no dimension 0 "
                    "is needed."
                )
            if not torch.isfinite(tensor).all():
                raise InputError(
                    f"{key!r} holds NaN or Inf: encode the prompts again in a wider dtype."
                )
        count = len(self)
        for key, tensor in tensors.items():
            like = self.prompt_embeds if tensor.ndim == 3 else self.pooled_prompt_embeds
            counts = (1, count) if key.startswith("negative") else (count,)
            if tensor.shape[0] not in counts or tensor.shape[1:] != like.shape[1:]:
                raise InputError(
                    f"{key!r} has shape {list(tensor.shape)}; {_RANKS[key]} with N = {count} and "
                    f"the last dimensions {list(like.shape[1:])} is needed."
                )

    def __len__(self) -> int:
        return int(self.prompt_embeds.shape[0])

    def tensors(self) -> dict[str, Tensor]:
        """Return the four tensors under the names of the diffusers pipeline's arguments."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def arguments(self, index: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return one sample as keyword arguments of the diffusers pipeline, batch size 1.

        Args:
            index: sample, >= 0; taken modulo N.
            device: where the pipeline runs.
            dtype: dtype of its denoiser.
        """
        row = index % len(self)
        return {
            key: tensor[row % tensor.shape[0]].unsqueeze(0).to(device, dtype)
            for key, tensor in self.tensors().items()
        }

    def hash(self) -> str:
        """Return the SHA-256 of names, dtypes, shapes and values, as 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for key, tensor in self.tensors().items():
            digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def load_embeddings(path: str | os.PathLike[str]) -> Embeddings:
    """Read prompt embeddings from a safetensors file of the four tensors of `Embeddings`.

    Raises:
        InputError: the file cannot be read.
        FormatError: a tensor is missing, or its dtype, shape or values cannot be used.
    """
    with Checkpoint.open(path) as checkpoint:
        missing = [key for key in _RANKS if key not in checkpoint.tensors]
        if missing:
            raise FormatError(
                f"{path} lacks {', '.join(map(repr, missing))}: an embeddings file holds "
                + ", ".join(f"{key!r} {rank}" for key, rank in _RANKS.items())
                + "."
            )
        tensors = {key: checkpoint.read(key) for key in _RANKS}
    try:
        return Embeddings(**tensors)
    except InputError as error:
        raise FormatError(f"{path}: {error}") from error


def save_embeddings(path: str | os.PathLike[str], embeddings: Embeddings) -> None:
    """Write prompt embeddings to a safetensors file that `load_embeddings` reads."""
    tensors = embeddings.tensors()
    specs = [
        TensorSpec(key, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        for key, tensor in tensors.items()
    ]
    with CheckpointWriter(path, specs, metadata_bytes=0) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor.cpu().contiguous())
        writer.commit({})
