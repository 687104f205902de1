"""The files of a heatmap: an overlay per word, the raw maps, and a page that shows them side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image, ImageOps

from sdcli.generation.filenames import slug

COLD, WARM, HOT = "#000004", "#bc3754", "#fcffa4"
"""The ends and the middle of matplotlib's inferno."""
OPACITY = 0.65
THUMBNAIL = 320
"""Pixels a side of the images in the page."""

Map = np.ndarray[tuple[int, int], np.dtype[np.float32]]
"""[h, w]: the share of the attention at each place."""


@dataclass(frozen=True)
class Heatmap:
    """The maps of one image."""

    words: Mapping[str, Map]
    apart: Mapping[str, Map]
    """Of tokens that belong to no word: start, end, padding, punctuation."""
    tokens: np.ndarray[tuple[int, int, int], np.dtype[np.float32]]
    """[L, h, w], of each token of the context."""
    absent: Sequence[str] = ()
    """Named words that are not in the text as the encoder read it."""
    cut: str = ""
    """The end of the prompt, where the text encoder did not read it."""


def files(heatmap: Heatmap, image: Image.Image) -> Iterator[tuple[str, bytes]]:
    """The names and contents of the files in an image's folder of maps; `index.html` is the last one."""
    names = {word: f"{number:02}-{slug(word)}.png" for number, word in enumerate(heatmap.words, start=1)}
    overlays = {word: overlay(image, heat) for word, heat in heatmap.words.items()}
    for word, shown in overlays.items():
        yield names[word], _encoded(shown, "PNG")
    yield "maps.npz", _arrays(heatmap)
    yield "index.html", _page(heatmap, image, overlays, names).encode()


def overlay(image: Image.Image, heat: Map) -> Image.Image:
    """A map on the image, from its own coldest place (dark) to its own hottest (bright)."""
    spread = heat - heat.min()
    scaled = spread / max(float(spread.max()), 1e-12)
    shade = Image.fromarray(np.uint8(scaled * 255)).resize(image.size, Image.Resampling.BICUBIC)
    coloured = ImageOps.colorize(shade, black=COLD, mid=WARM, white=HOT)
    return Image.blend(image.convert("L").convert("RGB"), coloured, OPACITY)


def _encoded(image: Image.Image, format: str) -> bytes:
    data = io.BytesIO()
    image.save(data, format=format)
    return data.getvalue()


def _arrays(heatmap: Heatmap) -> bytes:
    data = io.BytesIO()
    shape = heatmap.tokens.shape[1:]
    np.savez_compressed(
        data,
        words=np.array(list(heatmap.words), dtype=str),
        maps=np.array(list(heatmap.words.values()), dtype=np.float32).reshape(-1, *shape),
        apart=np.array(list(heatmap.apart), dtype=str),
        apart_maps=np.array(list(heatmap.apart.values()), dtype=np.float32).reshape(-1, *shape),
        tokens=heatmap.tokens,
    )
    return data.getvalue()


def _page(heatmap: Heatmap, image: Image.Image, overlays: Mapping[str, Image.Image], names: Mapping[str, str]) -> str:
    total = sum(float(heat.mean()) for heat in heatmap.words.values()) or 1.0
    figures = [_figure(image, "the image", "")]
    for word, heat in heatmap.words.items():
        share = float(heat.mean()) / total
        numbers = f"{share:.1%} of these words' attention; at most {float(heat.max()):.1%} of a place's"
        link = f'<a href="{escape(names[word])}">{escape(word)}</a>'
        figures.append(_figure(overlays[word], link, f'{numbers}<meter value="{share:.4f}"></meter>'))
    rest = ", ".join(f"{escape(name)} {float(heat.mean()):.1%}" for name, heat in heatmap.apart.items())
    notes = [f"Of all attention, what is no word has: {rest}."]
    notes += [f"Not in the prompt as the text encoder read it: {escape(word)}." for word in heatmap.absent]
    notes += [f"Not read by the text encoder: <s>{escape(heatmap.cut)}</s>"] if heatmap.cut else []
    return _PAGE.format(figures="\n".join(figures), notes="\n".join(f"<p>{note}</p>" for note in notes))


def _figure(image: Image.Image, caption: str, more: str) -> str:
    shown = ImageOps.contain(image, (THUMBNAIL, THUMBNAIL))
    source = base64.b64encode(_encoded(shown, "WEBP")).decode()
    text = f"<figcaption><b>{caption}</b> {more}</figcaption>"
    return f'<figure><img src="data:image/webp;base64,{source}" alt="">{text}</figure>'


_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Which word drew what</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em; color-scheme: light dark; }}
main {{ display: flex; flex-wrap: wrap; gap: 1em; }}
figure {{ margin: 0; width: 20em; }}
img, meter {{ width: 100%; display: block; }}
</style>
<h1>Which word drew what</h1>
<main>
{figures}
</main>
{notes}
<p>Each map shows where the network attended to a word over the run: the mean over heads, layers and steps, from the
word's own coldest place to its own hottest. That is a hint at what the word drew, not a measure of it. The raw maps are
in <a href="maps.npz">maps.npz</a>.</p>
</html>
"""
