"""Rasterise the sprites of the starter's training images: emoji in four styles, from npm packages.

    pip install resvg-py
    python scripts/starter/sprites.py WORK

writes WORK/sprites.npy, uint8 [sprites, 128, 128, 4], premultiplied RGBA, and WORK/sprites.json, a line for each. With
--side 256, sprites have 256 pixels per side, and scenes.py composes images of that size.
`npm pack` downloads the packages to WORK/packages, once. The same packages give the same files. WORK/SOURCES.md names
the packages and their licences.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))
import make_emoji_dataset as emoji

SIDES = (128, 256)
"""Width and height in pixels: the first is the default."""
RASTER = 512
"""Width and height in pixels at which the drawings are rasterised before they are cropped and reduced."""
STYLES = ("fluent-emoji", "fluent-emoji-flat", "noto", "twemoji")

GROUPS = ("smileys-emotion", "people-body", "animals-nature", "food-drink", "travel-places", "activities", "objects")
SYMBOLS = frozenset(
    [
        "warning",
        "no entry",
        "radioactive",
        "biohazard",
        "check mark",
        "cross mark",
        "question mark",
        "red question mark",
        "red exclamation mark",
        "recycling symbol",
        "peace symbol",
        "yin yang",
        "plus",
        "musical notes",
        "musical note",
    ]
)
"""Symbols that depict something; the others are letters and signs."""
GEOMETRIC = re.compile(
    r"^(red|orange|yellow|green|blue|purple|brown|black|white|large|diamond)(?!.*(small|medium|button))"
)
VARIANT = re.compile(
    r"^(man|woman|men|women|person)(:| (?!dancing$))|facing right|wheelchair|pregnant|feeding|veil|^breast|"
    r"-thirty$|o’clock$|o'clock$"
)
"""Variants of another emoji, different in a detail too small for 128 pixels, or only in a person's sex."""
NOT_A_VARIANT = re.compile(
    r"^person (biking|running|swimming|surfing|rowing|lifting|walking|climbing|bouncing|juggling|in )"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the folder to write to")
    parser.add_argument("--side", type=int, choices=SIDES, default=SIDES[0], help="pixels per side (%(default)s)")
    parser.add_argument("--processes", type=int, help="number of processes (default: one per core)")
    chosen = parser.parse_args()
    work = chosen.work
    packages = work / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    wanted = [emoji.NAMES, *(f"@iconify-json/{style}" for style in STYLES)]
    missing = [name for name in wanted if not list(packages.glob(f"{name.strip('@').replace('/', '-')}-[0-9]*.tgz"))]
    if missing:
        emoji.fetch(missing, packages)
    entries = emoji.read(packages, emoji.NAMES, "en/data.json")
    names = emoji.read(packages, emoji.NAMES, "meta/groups.json")
    subgroups = {entry["hexcode"]: names["subgroups"].get(str(entry.get("subgroup"))) for entry in entries}
    concepts = [one for one in emoji.select(entries, names, None) if is_concept(one, subgroups[one.code])]
    drawings = [drawing for style in STYLES for drawing in emoji.drawings(packages, style, concepts)]
    with Pool(chosen.processes) as pool:
        drawn = pool.map(partial(sprite, side=chosen.side), drawings, chunksize=16)
    lines, pixels = [], []
    for drawing, image in zip(drawings, drawn, strict=True):
        if image is not None:
            one = drawing.emoji
            facts = {"label": one.label, "style": drawing.style, "group": one.group, "tags": one.tags}
            lines.append(json.dumps(facts | {"subgroup": subgroups[one.code]}, ensure_ascii=False) + "\n")
            pixels.append(image)
    np.save(work / "sprites.npy", np.stack(pixels))
    (work / "sprites.json").write_text("".join(lines), encoding="utf-8")
    sources = "".join(f"{emoji.source(packages, name)}\n" for name in wanted)
    (work / "SOURCES.md").write_text(f"# Sources\n\n{sources}", encoding="utf-8")
    print(f"{len(pixels)} sprites of {len({json.loads(line)['label'] for line in lines})} concepts")


def is_concept(one: emoji.Emoji, subgroup: str | None) -> bool:
    """Whether an emoji shows something that people prompt for and that is distinguishable from the others."""
    if subgroup == "geometric":
        return bool(GEOMETRIC.search(one.label))
    if one.group == "symbols":
        return one.label in SYMBOLS
    if one.group not in GROUPS or subgroup in ("family", "person-symbol"):
        return one.label in ("couple with heart", "footprints")
    return not VARIANT.search(one.label) or bool(NOT_A_VARIANT.search(one.label)) or one.label == "alarm clock"


def sprite(drawing: emoji.Drawing, *, side: int = SIDES[0]) -> np.ndarray | None:
    """A drawing as uint8 [side, side, 4], premultiplied RGBA; None if nothing is visible."""
    image = emoji.rasterise(drawing, size=side, margin=0.0, transparent=True, oversampling=RASTER // side)
    # "RGBa" is Pillow's premultiplied mode, which tobytes preserves.
    return None if image is None else np.frombuffer(image.convert("RGBa").tobytes(), np.uint8).reshape(side, side, 4)


if __name__ == "__main__":
    main()
