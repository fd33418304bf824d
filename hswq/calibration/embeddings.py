"""Prompt embeddings: what text encoders give, from a file or encoded once for a whole run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hswq.errors import FormatError, InputError
from hswq.formats.dtypes import DTYPE_NAMES
from hswq.formats.reader import Checkpoint
from hswq.formats.writer import CheckpointWriter, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_INTEGERS = (torch.bool, torch.uint8, torch.int32, torch.int64)
_MASK = "_mask"
_SHAPES = {
    "prompt_embeds": "[N, T, C]",
    "pooled_prompt_embeds": "[N, P]",
    "negative_prompt_embeds": "[1 or N, T, C]",
    "negative_pooled_prompt_embeds": "[1 or N, P]",
    "prompt_embeds_mask": "[N, T]",
    "negative_prompt_embeds_mask": "[1 or N, T]",
}


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Prompt embeddings of N samples, under the names of the diffusers pipelines' arguments.

    Which of them a run needs is the family's matter. The tokens of a negative prompt may be of
    another number where it has a mask.

    Attributes:
        prompt_embeds: [N, T, C], float16, bfloat16 or float32.
        pooled_prompt_embeds: [N, P], or None.
        negative_prompt_embeds: [N, T, C], or [1, T, C] for all samples, or None.
        negative_pooled_prompt_embeds: [N, P], or [1, P] for all samples, or None.
        prompt_embeds_mask: [N, T], bool or integer: the tokens that count; None: all.
        negative_prompt_embeds_mask: the same for the negative prompts.
        prompts: hash of the prompts that were encoded for this run; None for those of a file.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    prompt_embeds_mask: Tensor | None = None
    negative_prompt_embeds_mask: Tensor | None = None
    prompts: str | None = None

    def __post_init__(self) -> None:
        tensors = self.tensors()
        for key, tensor in tensors.items():
            _check_values(key, tensor)
        count = len(self)
        for key, tensor in tensors.items():
            expected = self._expected(key)
            counts = (1, count) if key.startswith("negative") else (count,)
            if tensor.shape[0] not in counts or list(tensor.shape[1:]) != expected:
                raise InputError(
                    f"{key!r} has shape {list(tensor.shape)}; {_SHAPES[key]} with N = {count} and "
                    f"the last dimensions {expected} is needed."
                )

    def __len__(self) -> int:
        return int(self.prompt_embeds.shape[0])

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are there, by name."""
        named = {key: getattr(self, key) for key in _SHAPES}
        return {key: tensor for key, tensor in named.items() if tensor is not None}

    def sample(self, index: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the embeddings of one sample, batch size 1, without the tokens masked out.

        Args:
            index: sample, >= 0; taken modulo N.
            device: where the pipeline runs.
            dtype: dtype of its denoiser.
        """
        row = index % len(self)
        tensors = self.tensors()
        chosen = {}
        for key, tensor in tensors.items():
            if key.endswith(_MASK):
                continue
            values, mask = tensor[row % tensor.shape[0]], tensors.get(key + _MASK)
            if mask is not None:
                values = values[mask[row % mask.shape[0]].bool()]
            chosen[key] = values.unsqueeze(0).to(device, dtype)
        return chosen

    def length(self, index: int) -> int:
        """Return the number of tokens of a sample's prompt, those masked out not counted."""
        row = index % len(self)
        if self.prompt_embeds_mask is None:
            return int(self.prompt_embeds.shape[1])
        return int(self.prompt_embeds_mask[row].bool().sum())

    def hash(self) -> str:
        """Return the SHA-256 of names, dtypes, shapes and values, as 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for key, tensor in self.tensors().items():
            digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _expected(self, key: str) -> list[int]:
        """Return the dimensions of a tensor after the first."""
        if key.endswith(_MASK):
            masked = getattr(self, key.removesuffix(_MASK))
            if masked is None:
                raise InputError(f"{key!r} masks embeddings that are missing.")
            return [int(masked.shape[1])]
        if "pooled" in key:
            like = self.pooled_prompt_embeds
            if like is None:
                raise InputError(f"{key!r} is given without 'pooled_prompt_embeds'.")
            return list(like.shape[1:])
        tokens, channels = self.prompt_embeds.shape[1:]
        if key.startswith("negative") and self.negative_prompt_embeds_mask is not None:
            tokens = getattr(self, key).shape[1]
        return [int(tokens), int(channels)]


def encode_prompts(
    prompts: Sequence[str],
    encode: Callable[[str], Mapping[str, Tensor]],
    label: str,
    report: Callable[[int], None],
) -> Embeddings:
    """Encode prompts one by one, each as the pipeline would encode it alone.

    Args:
        prompts: at least one.
        encode: gives a prompt's embeddings, batch size 1; those of negative prompts are the same
            for all.
        label: hash of all the run's prompts, kept with the result.
        report: called after every prompt with their number so far.
    Returns:
        Embeddings on the CPU, prompts of fewer tokens padded with zeros and masked.
    """
    rows: list[dict[str, Tensor]] = []
    for number, prompt in enumerate(prompts, 1):
        rows.append({key: tensor.cpu() for key, tensor in encode(prompt).items()})
        report(number)
    tensors: dict[str, Any] = {}
    for key in rows[0]:
        if key.startswith("negative"):
            tensors[key] = rows[0][key]
        elif "pooled" in key:
            tensors[key] = torch.cat([row[key] for row in rows])
        else:
            texts = [row[key][0] for row in rows]
            tensors[key] = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
            lengths = torch.tensor([len(text) for text in texts])
            tensors[key + _MASK] = torch.arange(int(lengths.max())) < lengths[:, None]
    negative = tensors.get("negative_prompt_embeds")
    if negative is not None:
        tensors["negative_prompt_embeds" + _MASK] = torch.ones(1, negative.shape[1]).bool()
    return Embeddings(**tensors, prompts=label)


def load_embeddings(path: str | os.PathLike[str]) -> Embeddings:
    """Read prompt embeddings from a safetensors file of the tensors of `Embeddings`.

    Raises:
        InputError: the file cannot be read.
        FormatError: there are no prompt_embeds, or a tensor's dtype, shape or values cannot be
            used.
    """
    with Checkpoint.open(path) as checkpoint:
        if "prompt_embeds" not in checkpoint.tensors:
            raise FormatError(
                f"{path} lacks 'prompt_embeds': an embeddings file holds, as far as the model "
                "takes them, "
                + ", ".join(f"{key!r} {shape}" for key, shape in _SHAPES.items())
                + "."
            )
        tensors: dict[str, Any] = {
            key: checkpoint.read(key) for key in _SHAPES if key in checkpoint.tensors
        }
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


def check_embeddings(
    embeddings: Embeddings, needed: Sequence[str], widths: Mapping[str, int | None]
) -> None:
    """Refuse embeddings that a family's denoiser cannot be run with.

    Args:
        embeddings: what is to be fed in.
        needed: names of those that a sample needs.
        widths: channels that the denoiser reads, by name; None where that is not known.
    Raises:
        InputError: one is missing, or was made with text encoders of another model.
    """
    tensors = embeddings.tensors()
    missing = [key for key in needed if key not in tensors]
    if missing:
        raise InputError(
            f"the embeddings lack {', '.join(map(repr, missing))}, which sampling this model with "
            f"this guidance needs: " + ", ".join(f"{key!r} {_SHAPES[key]}" for key in needed) + "."
        )
    for key, width in widths.items():
        shape = list(tensors[key].shape)
        if width not in (None, shape[-1]):
            raise InputError(
                f"{key!r} has shape {shape}, but this denoiser needs a last dimension of {width}: "
                "the embeddings were made with text encoders of another model."
            )


def _check_values(key: str, tensor: Tensor) -> None:
    if tensor.ndim != _SHAPES[key].count(",") + 1 or 0 in tensor.shape:
        raise InputError(
            f"{key!r} has shape {list(tensor.shape)}; {_SHAPES[key]} with no dimension 0 is needed."
        )
    if key.endswith(_MASK):
        if tensor.dtype not in _INTEGERS or not bool(tensor.bool().any(1).all()):
            raise InputError(
                f"{key!r} is {tensor.dtype}; bool or integers are needed, at least one a row not 0."
            )
        return
    if tensor.dtype not in _FLOATS:
        raise InputError(f"{key!r} is {tensor.dtype}; float16, bfloat16 or float32 is needed.")
    if not torch.isfinite(tensor).all():
        raise InputError(f"{key!r} holds NaN or Inf: encode the prompts again in a wider dtype.")
