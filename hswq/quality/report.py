"""The page of a comparison: figures, charts, images side by side."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hswq.errors import InputError
from hswq.formats.writer import write_whole
from hswq.quality.bench import METRICS, Bench, Entry, per_prompt
from hswq.quality.plots import pyplot, save

# Prompts whose images are shown; the JSON has the figures of all.
_SHOWN = 8
# Differences are shown this many times as strong.
_GAIN = 8.0
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
       color: #1c1c1c; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; margin: .8rem 0 }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .7rem; text-align: right;
         font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
td.best { font-weight: 600 }
.images { display: flex; gap: .5rem; overflow-x: auto }
figure { flex: 1 1 0; min-width: 7rem; max-width: 16rem; margin: .3rem 0 }
figure img { display: block; width: 100% }
figcaption { font-size: .8rem; overflow-wrap: anywhere; color: #444 }
small, .note { color: #555 } svg { max-width: 100%; height: auto }
"""


def data_path(page: str | os.PathLike[str]) -> Path:
    """Return where the figures of a page are written: beside it."""
    return Path(page).with_suffix(".json")


def write_report(bench: Bench, path: str | os.PathLike[str]) -> Path:
    """Write the page, and the figures as JSON beside it.

    Returns:
        The path of the JSON.
    Raises:
        InputError: matplotlib or Pillow is not installed, or a file cannot be written.
    """
    target, data = Path(path), data_path(path)
    page = _page(bench)
    figures = json.dumps(bench.to_dict(), indent=1)
    write_whole(data, f"{figures}\n".encode())
    write_whole(target, page.encode())
    return data


def _page(bench: Bench) -> str:
    title = f"{escape(bench.model)}: FP8 files compared"
    settings = ", ".join(f"{name} {value}" for name, value in bench.settings.items())
    metrics = [name for name in METRICS if any(name in entry.values for entry in bench.entries)]
    parts = [
        f"<h1>{title}</h1>",
        f"<p>{len(bench.prompts)} prompts, {len(bench.seeds)} noises each; {escape(settings)}. "
        "Everything is measured against the unquantized model. Figures are means, with the half "
        "width of the 95 % interval over the prompts (over the calls for noise_error).</p>",
        "<h2>Figures</h2>",
        _figures(bench, metrics),
        "<ul class=note>",
        *(f"<li>{name}: {escape(METRICS[name][1])}</li>" for name in metrics),
        "</ul>",
        *([] if "lpips" in metrics else ["<p class=note>LPIPS is not installed.</p>"]),
        "<h2>Charts</h2>",
        _chart(bench, "latent_mse"),
        _chart(bench, "noise_error"),
        "<h2>Images</h2>",
        f"<p class=note>Differences are {_GAIN:g} times as strong, grey is none.</p>",
        *_images(bench),
        "<h2>Prompts</h2>",
        _prompt_table(bench),
        "<h2>Options of the files</h2>",
        *_option_lists(bench),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _figures(bench: Bench, metrics: list[str]) -> str:
    means = [entry.means(len(bench.prompts)) for entry in bench.entries]
    best = {}
    for name in metrics:
        known = [it[name][0] for it in means if name in it]
        best[name] = (max if METRICS[name][0] else min)(known)
    rows = [
        "<tr><th>file</th><th>size</th>" + "".join(f"<th>{it}</th>" for it in metrics) + "</tr>"
    ]
    for entry, found in zip(bench.entries, means, strict=True):
        cells = [f"<td>{escape(entry.name)}</td><td>{_size(entry)}</td>"]
        for name in metrics:
            mean, width = found.get(name, (math.nan, math.nan))
            mark = ' class="best"' if mean == best[name] else ""
            cells.append(f"<td{mark}>{_number(mean)} <small>± {_number(width)}</small></td>")
        rows.append("<tr>" + "".join(cells) + "</tr>")
    return "<table>" + "\n".join(rows) + "</table>"


def _chart(bench: Bench, metric: str) -> str:
    plots = pyplot()
    figure, axes = plots.subplots(
        figsize=(7.5, 0.9 + 0.35 * len(bench.entries)), layout="constrained"
    )
    means = [entry.means(len(bench.prompts))[metric] for entry in bench.entries]
    names = [entry.name for entry in bench.entries]
    places = range(len(names))
    widths = [width if math.isfinite(width) else 0.0 for _, width in means]
    axes.barh(places, [mean for mean, _ in means], xerr=widths, color="#4878a8", capsize=3)
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()
    if all(mean > 0.0 for mean, _ in means):
        axes.set_xscale("log")
    axes.set_xlabel(metric)
    axes.grid(visible=True, axis="x", alpha=0.3)
    drawn = io.StringIO()
    save(figure, drawn, "svg")
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]


def _images(bench: Bench) -> Iterator[str]:
    seeds = len(bench.seeds)
    for number, prompt in enumerate(bench.prompts[:_SHOWN]):
        row = number * seeds
        exact = bench.exact.images[row]
        shown = [_image(exact, "unquantized")]
        for entry in bench.entries:
            ours = entry.painted.images[row]
            shown.append(_image(ours, entry.name))
            difference = (ours - exact) * _GAIN / 2 + 0.5
            shown.append(_image(difference, f"{entry.name}, difference"))
        yield f"<h3>{escape(prompt)} <small>(noise {bench.seeds[0]})</small></h3>"
        yield '<div class="images">' + "".join(shown) + "</div>"


def _image(pixels: Tensor, caption: str) -> str:
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("reports need Pillow: pip install 'hswq[bench]'.") from error
    values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    stored = io.BytesIO()
    Image.fromarray(values).save(stored, "png", optimize=True)
    text = base64.b64encode(stored.getvalue()).decode()
    label = escape(caption, quote=True)
    return (
        f'<figure><img alt="{label}" src="data:image/png;base64,{text}">'
        f"<figcaption>{label}</figcaption></figure>"
    )


def _prompt_table(bench: Bench) -> str:
    names = "".join(f"<th>{escape(entry.name)}</th>" for entry in bench.entries)
    rows = [f"<tr><th>prompt (latent_mse)</th>{names}</tr>"]
    columns = [per_prompt(it.values["latent_mse"], len(bench.prompts)) for it in bench.entries]
    for prompt, *values in zip(bench.prompts, *columns, strict=True):
        cells = "".join(f"<td>{_number(value)}</td>" for value in values)
        rows.append(f"<tr><td>{escape(prompt)}</td>{cells}</tr>")
    return "<table>" + "\n".join(rows) + "</table>"


def _option_lists(bench: Bench) -> Iterator[str]:
    for entry in bench.entries:
        options = _described(entry)
        yield f"<p><b>{escape(entry.name)}</b>: {escape(options)}</p>"


def _described(entry: Entry) -> str:
    if not entry.has_file:
        return (
            "every Linear and Conv2d rounded to E4M3 without a scale, made for this comparison; "
            "its size is predicted"
        )
    known: dict[str, Any] = entry.options
    return ", ".join(f"{name} {value}" for name, value in known.items()) or "not written by hswq"


def _size(entry: Entry) -> str:
    return f"{'' if entry.has_file else '≈ '}{entry.file_bytes / 1e6:,.1f} MB"


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3g}" if math.isfinite(value) else "∞"
