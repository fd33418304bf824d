"""The demo model's world: scenes of one shape on a plain background, their images and captions.

A scene is a size, a colour, a shape, a place and a background colour. `draw` turns it into pixels,
`describe` into the caption the model is trained on, and `recognize` reads a scene back out of
pixels, so that what a model paints can be checked against what it was asked for. `write_tokenizer`
derives from the words of the captions a byte pair vocabulary in CLIP's file format.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

RESOLUTION = 64
TOKEN_COUNT = 16  # a full caption has 12 words, begin and end make 14

RADIUS = {"small": 0.12, "large": 0.20}  # in units of the image's side
COLORS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 225, 60),
    "green": (50, 165, 70),
    "blue": (40, 80, 210),
    "purple": (140, 60, 180),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
PLACES = {  # phrase -> centre (x, y) in units of the image's side
    "at the top left": (0.25, 0.25),
    "at the top": (0.50, 0.25),
    "at the top right": (0.75, 0.25),
    "on the left": (0.25, 0.50),
    "in the center": (0.50, 0.50),
    "on the right": (0.75, 0.50),
    "at the bottom left": (0.25, 0.75),
    "at the bottom": (0.50, 0.75),
    "at the bottom right": (0.75, 0.75),
}


@dataclass(frozen=True)
class Scene:
    """One image's content; every field is a key of the tables above."""

    size: str
    color: str
    shape: str
    place: str
    background: str


def all_scenes() -> list[Scene]:
    """Every scene whose shape can be told from its background, in a fixed order."""
    fields = itertools.product(RADIUS, COLORS, SHAPES, PLACES, COLORS)
    return [scene for scene in itertools.starmap(Scene, fields) if scene.color != scene.background]


def demo_scenes(count: int = 64, seed: int = 7) -> list[Scene]:
    """The scenes of the shipped prompts: held out of training, so they show what it generalized."""
    scenes = all_scenes()
    chosen = np.random.default_rng(seed).choice(len(scenes), count, replace=False)
    return [scenes[index] for index in chosen]


def describe(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The scene's caption; `rng` leaves out size, place and background one time in ten each."""
    parts = [f"{scene.size} ", f" {scene.place}", f" on a {scene.background} background"]
    if rng is not None:
        parts = [part if rng.random() >= 0.1 else "" for part in parts]
    size, place, background = parts
    return f"a {size}{scene.color} {scene.shape}{place}{background}"


def draw_mask(shape: str, x: float, y: float, radius: float, resolution: int) -> np.ndarray:
    """Coverage of each pixel by the shape: float32 [resolution, resolution] in [0, 1]."""
    oversampling = 4
    side = resolution * oversampling
    image = Image.new("L", (side, side))
    pen = ImageDraw.Draw(image)

    def disc(r: float, fill: int) -> None:
        pen.ellipse([(x - r) * side, (y - r) * side, (x + r) * side, (y + r) * side], fill=fill)

    def polygon(points: list[tuple[float, float]]) -> None:
        corners = [((x + radius * dx) * side, (y + radius * dy) * side) for dx, dy in points]
        pen.polygon(corners, fill=255)

    def on_circle(count: int, radii: tuple[float, ...]) -> list[tuple[float, float]]:
        angles = [2 * math.pi * corner / count - math.pi / 2 for corner in range(count)]
        lengths = itertools.cycle(radii)
        return [(r * math.cos(a), r * math.sin(a)) for a, r in zip(angles, lengths, strict=False)]

    if shape == "circle":
        disc(radius, 255)
    elif shape == "ring":
        disc(radius, 255)
        disc(radius * 0.55, 0)
    elif shape == "square":
        polygon([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)])
    elif shape == "triangle":
        polygon(on_circle(3, (1.1,)))
    elif shape == "star":
        polygon(on_circle(10, (1.15, 0.48)))
    elif shape == "cross":
        a, b = 1.0, 0.34
        polygon([(-b, -a), (b, -a), (b, a), (-b, a)])
        polygon([(-a, -b), (a, -b), (a, b), (-a, b)])
    return np.asarray(image.reduce(oversampling), np.float32) / 255


def mix_color(name: str, rng: np.random.Generator) -> np.ndarray:
    """A colour of the palette, a little off: float64 [3] in [0, 1]."""
    return np.clip(np.array(COLORS[name]) + rng.uniform(-8, 8, 3), 0, 255) / 255


def draw(scene: Scene, rng: np.random.Generator, resolution: int = RESOLUTION) -> np.ndarray:
    """Paint a scene, place, radius and colours jittered a little: float32 [H, W, 3] in [0, 1]."""
    x, y = np.array(PLACES[scene.place]) + rng.uniform(-0.02, 0.02, 2)
    radius = RADIUS[scene.size] * rng.uniform(0.95, 1.05)
    mask = draw_mask(scene.shape, x, y, radius, resolution)[..., None]
    ink, paper = mix_color(scene.color, rng), mix_color(scene.background, rng)
    return (mask * ink + (1 - mask) * paper).astype(np.float32)


def draw_collage(rng: np.random.Generator, resolution: int, count: int = 6) -> np.ndarray:
    """Paint shapes of all sizes over each other: colours and edges for an autoencoder to learn."""
    names = list(COLORS)
    image = np.broadcast_to(mix_color(rng.choice(names), rng), (resolution, resolution, 3))
    for _ in range(count):
        x, y, radius = rng.uniform([0.1, 0.1, 0.1], [0.9, 0.9, 0.3])
        mask = draw_mask(rng.choice(SHAPES), x, y, radius, resolution)[..., None]
        image = mask * mix_color(rng.choice(names), rng) + (1 - mask) * image
    return image.astype(np.float32)


def recognize(image: np.ndarray) -> Scene:
    """Read the scene off an image, whatever painted it.

    The background is the palette colour nearest to the border's median, the shape all pixels that
    are far from it; place comes from the centre of the shape's box, and size and shape from the
    drawn mask that overlaps best.

    Args:
        image: float [H, W, 3] in [0, 1].
    """
    names = list(COLORS)
    palette = np.array(list(COLORS.values())) / 255

    def nearest(color: np.ndarray) -> str:
        return names[int(np.argmin(((palette - color) ** 2).sum(1)))]

    border = np.concatenate([image[:3].reshape(-1, 3), image[-3:].reshape(-1, 3)])
    paper = np.median(border, axis=0)
    distance = np.sqrt(((image - paper) ** 2).sum(-1))
    inside = distance > 0.5 * np.quantile(distance, 0.995)
    background, color = nearest(paper), nearest(np.median(image[inside], axis=0))
    rows, columns = np.nonzero(inside)
    side = image.shape[0]
    x, y = (np.quantile(axis, [0.01, 0.99]).mean() / side for axis in (columns, rows))
    place = min(PLACES, key=lambda name: math.dist(PLACES[name], (x, y)))

    def overlap(candidate: tuple[str, str]) -> float:
        shape, size = candidate
        # The box of a triangle or star is not centred on the point it was drawn around.
        lowest = {"triangle": 0.55, "star": 0.93}.get(shape, 1.0)
        highest = {"triangle": 1.1, "star": 1.15}.get(shape, 1.0)
        shift = RADIUS[size] * (highest - lowest) / 2
        mask = draw_mask(shape, x, y + shift, RADIUS[size], side) > 0.5
        return float((mask & inside).sum() / (mask | inside).sum())

    shape, size = max(itertools.product(SHAPES, RADIUS), key=overlap)
    return Scene(size, color, shape, place, background)


def agreement(asked: Scene, painted: Scene) -> list[bool]:
    """Which fields of two scenes are equal, in the order of Scene's fields."""
    return [a == b for a, b in zip(astuple(asked), astuple(painted), strict=True)]


def caption_words() -> list[str]:
    """Every word a caption can have, sorted."""
    return sorted({word for scene in all_scenes() for word in describe(scene).split()})


def byte_pair_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merge the most frequent neighbours until each word is one symbol; ties go by the alphabet.

    The encoder replays the merges in this order, so each of these words becomes one token.
    """
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for symbols in spellings for pair in itertools.pairwise(symbols)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for symbols in spellings:
            position = 0
            while position < len(symbols) - 1:
                if (symbols[position], symbols[position + 1]) == best:
                    symbols[position : position + 2] = ["".join(best)]
                position += 1
    return merges


def byte_symbols() -> tuple[list[str], list[str]]:
    """The characters byte-level BPE writes for the bytes of UTF-8 text, and those that end a word.

    Bytes that are no printable Latin-1 character are shifted to 256 and up, in order. Left out are
    bytes the tokenizer never sees: control characters, capitals (it lowers case) and those that
    UTF-8 lacks.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(0x100) if byte not in printable]
    symbol = {byte: chr(byte) for byte in printable}
    symbol |= {byte: chr(0x100 + rank) for rank, byte in enumerate(shifted)}
    ascii_bytes = [byte for byte in range(0x21, 0x7F) if not chr(byte).isupper()]
    continuation_bytes, leading_bytes = range(0x80, 0xC0), range(0xC2, 0xF5)
    anywhere = [*ascii_bytes, *continuation_bytes, *leading_bytes]
    last = [*ascii_bytes, *continuation_bytes]
    return [symbol[byte] for byte in anywhere], [symbol[byte] + "</w>" for byte in last]


def write_tokenizer(folder: Path, pad_token: str) -> None:
    """Write vocab.json, merges.txt and the special tokens as CLIPTokenizer reads them.

    The order of the vocabulary is CLIP's: bytes, bytes that end a word, merges, begin and end of
    text. Words no caption has fall to pieces, down to bytes.

    Args:
        folder: created if absent.
        pad_token: SDXL pads its first tokenizer with the end token and its second with "!".
    """
    folder.mkdir(parents=True, exist_ok=True)
    merges = byte_pair_merges(caption_words())
    start, end = "<|startoftext|>", "<|endoftext|>"
    anywhere, last = byte_symbols()
    tokens = [*anywhere, *last, *(first + second for first, second in merges), start, end]
    special = {"bos_token": start, "eos_token": end, "pad_token": pad_token, "unk_token": end}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKEN_COUNT, **special}
    vocabulary = {token: index for index, token in enumerate(tokens)}
    for name, content in (
        ("vocab.json", vocabulary),
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", settings),
    ):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
