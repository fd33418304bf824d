"""Hostile safetensors files by the million.

    python -m tests.formats.fuzz_header --files 1000000

Small good files are changed byte by byte, in their lengths and token by token. The reader must take
or refuse each with an error of hswq's, fast and without more memory than a file of that size is
worth; what it takes, safetensors' own reader must take with the same tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import resource
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import safetensors

from hswq.errors import FormatError, HswqError
from hswq.formats.quantized import quantized_weights
from hswq.formats.reader import Checkpoint
from hswq.models.detect import detect
from tests.formats.files import entry, pack

# tracemalloc slows everything down: every so many-th file is measured.
_MEASURED = 50
# Python objects of a small file are larger than the file.
_ALLOWANCE = 64 << 10
_ADDRESS_SPACE = 1 << 30
_TOKENS = (
    *("0", "-1", "1", "8", "9223372036854775807", "18446744073709551616", "1" * 400, "1e999"),
    *("0.5", "-0", "01", "true", "null", "NaN", "Infinity", "[]", "{}", "[[[[[]]]]]", '""'),
    *(
        '"F32"',
        '"F8_E4M3"',
        '"F4"',
        '"BOOL"',
        '"__metadata__"',
        '"../a"',
        '"a/b\\\\c"',
        '"\\ud800"',
    ),
    *('"\\u0000\\u001b[2J"', '"é"', "'a'", "[1,2]", "[4294967296,4294967296]", '{"a":1}'),
    *("{", "}", "[", "]", ",", ":", " ", "\\", '"', "\x00", "\ufeff"),
)
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+|\s+|"')


def good_files() -> list[bytes]:
    """Files that every reader takes."""
    many: dict[str, Any] = {"__metadata__": {"format": "pt", "note": 'a "quoted" text'}}
    many |= {f"block.{n}.weight": entry("F16", [2, 3], 12 * n, 12 * n + 12) for n in range(4)}
    scaled = {
        "l.weight": entry("F8_E4M3", [2, 2], 0, 4),
        "l.scale_weight": entry("F32", [], 4, 8),
        "empty": entry("F32", [0, 7], 8, 8),
        "b": entry("BOOL", [3], 8, 11),
    }
    return [
        pack({"a": entry("F32", [2], 0, 8)}, bytes(8)),
        pack(json.dumps(many, indent=1).encode(), bytes(range(48))),
        pack(json.dumps(scaled).encode().ljust(400), bytes(11)),
        pack({}),
    ]


def changed(data: bytes, chance: random.Random) -> bytes:
    """Return a file with one or a few changes of one kind."""
    kind = chance.randrange(6)
    if kind == 0:
        found = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            found[chance.randrange(len(found))] = chance.randrange(256)
        return bytes(found)
    if kind == 1:
        length = chance.choice(
            (0, 1, 2**31, 2**63, 2**64 - 1, len(data), len(data) - 8, chance.randrange(len(data)))
        )
        return (length % 2**64).to_bytes(8, "little") + data[8:]
    if kind == 2:
        begin, end = sorted(chance.randrange(len(data) + 1) for _ in range(2))
        return data[:begin] + (data[end:] if chance.random() < 0.5 else data[begin:end] + data)
    length = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + length].decode(), data[8 + length :]
    tokens = _TOKEN.findall(text)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        place = chance.randrange(len(tokens)) if tokens else 0
        if kind == 3 and tokens:
            tokens[place] = chance.choice(_TOKENS)
        elif kind == 4 and tokens:
            tokens[place] = chance.choice(tokens)
        else:
            tokens.insert(place, chance.choice(_TOKENS))
    return pack("".join(tokens).encode("utf-8", "surrogatepass"), rest)


def read(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Read a file as a whole; None where it is refused.

    Raises:
        Everything but FormatError, and what refusals of content raise behind the reader.
    """
    try:
        with Checkpoint.open(path) as checkpoint:
            found = {
                name: (info.dtype, info.shape, checkpoint.read_bytes(name, 0, info.nbytes))
                for name, info in checkpoint.tensors.items()
            }
            # What a reader does next with names and metadata that a stranger chose.
            with contextlib.suppress(HswqError):
                quantized_weights(checkpoint)
                detect(checkpoint)
            return found
    except FormatError:
        return None


def compare(data: bytes, ours: dict[str, Any]) -> None:
    """Check that safetensors takes the file too, and finds the same."""
    theirs = {
        name: (it["dtype"], tuple(it["shape"]), bytes(it["data"]))
        for name, it in safetensors.deserialize(data)
    }
    assert theirs == ours, data


def fuzz(files: int, seed: int) -> dict[str, Any]:
    """Read so many files.

    Returns:
        How many were accepted and refused, the slowest in ms, and the largest memory of a file
        beyond twice its bytes.
    Raises:
        AssertionError: a file took too much memory, or is read otherwise than by safetensors.
    """
    chance = random.Random(seed)
    bases = good_files()
    accepted, slowest, largest = 0, 0.0, 0
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        path = Path(file.name)
        for number in range(files):
            data = changed(chance.choice(bases), chance)
            path.write_bytes(data)
            measured = number % _MEASURED == 0
            if measured:
                tracemalloc.start()
            begun = time.perf_counter()
            found = read(path)
            seconds = time.perf_counter() - begun
            if measured:
                peak = tracemalloc.get_traced_memory()[1] - 2 * len(data)
                tracemalloc.stop()
                assert peak <= _ALLOWANCE, (peak, data)
                largest = max(largest, peak)
            else:
                slowest = max(slowest, seconds)
            if found is not None:
                accepted += 1
                compare(data, found)
    return {
        "files": files,
        "seed": seed,
        "accepted": accepted,
        "refused": files - accepted,
        "slowest_ms": round(1e3 * slowest, 2),
        "peak_bytes_beyond_twice_the_file": largest,
    }


def main() -> None:
    """Fuzz, and print what was found as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + _ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps(fuzz(options.files, options.seed)))


if __name__ == "__main__":
    main()
