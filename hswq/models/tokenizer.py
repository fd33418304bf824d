"""CLIP's tokenizer from the one vocabulary that hswq ships."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hswq.models.folders import SHIPPED

_MERGES = SHIPPED / "tokenizer" / "merges.txt"


def clip_vocabulary(merges: Sequence[str]) -> dict[str, int]:
    """Return CLIP's token ids: bytes, bytes that end a word, merges in order, start, end.

    Source: byte level pair encoding of GPT-2, whose printable stand-ins for bytes this rebuilds,
    with the end-of-word mark of OpenAI's CLIP.

    Args:
        merges: 'left right' lines in order of priority.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    stand_ins = range(0x100, 0x100 + 256 - len(printable))
    symbols = [chr(code) for code in (*printable, *stand_ins)]
    tokens = [
        *symbols,
        *(f"{symbol}</w>" for symbol in symbols),
        *(merge.replace(" ", "") for merge in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return {token: number for number, token in enumerate(tokens)}


def shipped_tokenizer(name: str) -> Any:
    """Return SDXL's transformers.CLIPTokenizer; the two share a vocabulary and pad differently.

    Args:
        name: 'tokenizer' or 'tokenizer_2'.
    """
    from transformers import CLIPTokenizer

    merges = _MERGES.read_text(encoding="utf-8").splitlines()[1:]
    # Every version of transformers reads a folder; what the constructor takes has changed.
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(_MERGES, folder)
        shutil.copy(SHIPPED / name / "tokenizer_config.json", folder)
        vocabulary = json.dumps(clip_vocabulary(merges), ensure_ascii=False)
        Path(folder, "vocab.json").write_text(vocabulary, encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
