"""Hostile safetensors files by the million.

    TMPDIR=/dev/shm python -m tests.formats.fuzz_header --files 1000000

In memory it runs ten times as fast as on a disk.

Small good files are changed byte by byte, in their lengths and token by token; a few of 1 to 20 MB
are made of what is dear to read. The reader must take or refuse each with an error of hswq's,
within a second and without more memory than SECURITY.md says; what it takes, safetensors' own
reader must take with the same tensors. The exit code is 1 where it is slower or takes more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import resource
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors

from benchmarks.record import print_row, record
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
_SLOWEST_MS = 1000.0
# Beyond twice the file: Python's objects of a tensor or of an entry of the metadata, and of every
# byte of names and metadata, which become four where one character lies beyond U+FFFF: the text of
# the file, the decoded one and the value, less the two that the file counts for.
_ENTRY_BYTES = 1 << 10
_TEXT_FACTOR = 7
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


def large_files(megabytes: float) -> Iterator[tuple[str, bytes, int, int]]:
    """Yield files of what is dear to read: what, the file, its entries, bytes of its texts."""
    size = int(megabytes * (1 << 20))
    plain, wide = "a" * size, "a" * (size - 4) + "\U0001f600"
    empty = json.dumps(entry("U8", [0], 0, 0)).encode()
    deep = json.dumps(entry("U8", [0] + [1] * 18, 0, 0)).encode()
    texts = {
        "plain": plain.encode(),
        "wide": wide.encode(),
        "backslashes": b"\\" * size,
        "quotes": b'\\"' * (size // 2),
        "pairs": b"\\ud83d\\ude00" * (size // 12),
        "controls": b"\x1b" * size,
        "no UTF-8": b"\xff" * size,
    }
    for what, text in texts.items():
        yield f"name: {what}", pack(b'{"' + text + b'":' + empty + b"}"), 1, size
        value = b'{"__metadata__":{"a":"' + text + b'"},"b":' + empty + b"}"
        yield f"metadata: {what}", pack(value), 2, size
        yield f"no end: {what}", pack(b'{"__metadata__":{"a":"' + text), 2, size
    for what, text in (("short", b""), ("long", b"a" * 4000), ("wide", texts["wide"][-4000:])):
        for kind, value in (("empty tensors", empty), ("many dimensions", deep)):
            entries = [b'"%d%s":%s' % (n, text, value) for n in range(size // len(value + text))]
            header = b"{" + b",".join(entries) + b"}"
            yield f"{kind}, {what} names", pack(header), len(entries), len(entries) * len(text)
        entries = [b'"%d%s":""' % (n, text) for n in range(size // (len(text) + 12))]
        header = b'{"__metadata__":{' + b",".join(entries) + b"}}"
        yield f"metadata, {what} names", pack(header), len(entries), len(entries) * len(text)
    for what, junk in (("[", b"["), ("{", b'{"a":'), ("spaces", b" "), ("digits", b"1")):
        yield f"junk: {what}", pack(b'{"a":' + junk * (size // len(junk)) + b"}"), 1, 0
        yield f"junk in an entry: {what}", pack(b'{"a":{"b":' + junk * size + b"}}"), 1, 0


def fuzz_large(megabytes: float) -> dict[str, Any]:
    """Read large files of every kind.

    Returns:
        How many, the slowest in ms and what it was, and the largest share of the memory that one of
        them may take.
    Raises:
        AssertionError: a file is read otherwise than by safetensors.
    """
    count, slowest, largest = 0, (0.0, ""), (0.0, "")
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        path = Path(file.name)
        for what, data, entries, text_bytes in large_files(megabytes):
            path.write_bytes(data)
            begun = time.process_time()
            found = read(path)
            slowest = max(slowest, (1e3 * (time.process_time() - begun), what))
            tracemalloc.start()
            read(path)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            limit = 2 * len(data) + _ALLOWANCE + _ENTRY_BYTES * entries + _TEXT_FACTOR * text_bytes
            largest = max(largest, (peak / limit, what))
            if found is not None:
                compare(data, found)
            count += 1
    return {
        "large_files": count,
        "large_slowest_ms": round(slowest[0], 2),
        "large_slowest": slowest[1],
        "large_peak_share_of_the_limit": round(largest[0], 3),
        "large_peak": largest[1],
    }


def main() -> int:
    """Fuzz, print what was found as a line of JSON, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=float, nargs="*", default=[1.0, 5.0, 20.0])
    parser.add_argument("--record", action="store_true", help="append it to benchmarks/results too")
    options = parser.parse_args()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + _ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    put = record if options.record else print_row
    failed = False
    for megabytes in options.megabytes:
        large = fuzz_large(megabytes)
        put({"op": "fuzz large headers", "megabytes": megabytes, **large})
        failed |= large["large_slowest_ms"] > _SLOWEST_MS
        failed |= large["large_peak_share_of_the_limit"] > 1.0
    found = fuzz(options.files, options.seed)
    put({"op": "fuzz headers", **found})
    return int(failed or found["slowest_ms"] > _SLOWEST_MS)


if __name__ == "__main__":
    sys.exit(main())
