"""Fonts for the labels of sheets: for each letter the first font that has it, so that no label is drawn as boxes.

Pillow's own font has ASCII. matplotlib, which this package needs, brings DejaVu Sans (Latin, Greek, Cyrillic, Arabic,
Hebrew, Georgian, Armenian). The extra `fonts` brings Noto for the other scripts, with CJK and emoji. Then come the
fonts of the system. Scripts written from right to left, and those whose letters change with their neighbours, need
Pillow's Raqm; without it they count as unreadable.
"""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import ImageDraw, ImageFont, features

FONT_SIZE = 12
PACKAGES = (
    ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans.ttf"),
    ("manimgx_fonts", "NotoSans*.ttf"),
    ("noto_cjk_sans_otc", "*.ttc"),
    ("manimgx_fonts", "NotoEmoji*.ttf"),
)
"""(package, its fonts), in the order in which they are tried."""
FAMILIES = ("noto", "cjk", "unifont", "droid", "pingfang", "msyh", "yugoth", "malgun", "segoe", "arial", "wqy", "ipa")
"""Parts of the names of fonts with many letters, which are tried before the other fonts of the system."""
STYLES = ("bold", "italic", "oblique", "light", "thin", "black", "mono", "serif", "condensed", "medium")
MOST_FONTS = 300
"""Of the system, that are searched for a letter."""
JOINERS = "\u200c\u200d"
"""Between letters that are joined, or are not; invisible themselves."""
SHAPED = ((0x0900, 0x0E00), (0x0F00, 0x10A0), (0x1780, 0x1800), (0x1900, 0x1C50), (0xA800, 0xAAE0))
"""Ranges of scripts, from Devanagari to Meetei Mayek, whose letters change with their neighbours."""

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True)
class Face:
    """A font, and the numbers of the letters that it has."""

    font: Font
    letters: frozenset[int]


@dataclass(frozen=True)
class LabelFont:
    """The fonts of one label: with `whole`, one font for all of it, else one for each run of letters."""

    whole: Face | None = None

    def getlength(self, text: str) -> float:
        """The width of one line in pixels."""
        return sum(font.getlength(run) for run, font in self._runs(text))

    def draw(self, onto: ImageDraw.ImageDraw, place: tuple[float, float], text: str) -> None:
        """Draw one line in black; `place` is the left upper corner that it has in Pillow's own font."""
        plain, (left, top) = _plain().font, place
        for run, font in self._runs(text):
            if font is plain:
                onto.text((left, top), run, fill="black", font=font)
            else:
                onto.text((left, top + _ascent(plain)), run, fill="black", font=font, anchor="ls")
            left += font.getlength(run)

    def _runs(self, text: str) -> Iterator[tuple[str, Font]]:
        if self.whole is not None:
            yield text, self.whole.font
            return
        run, face = "", _plain()
        for letter in text:
            other = face if run and _belongs(letter) else face_of(letter) or face
            if run and other is not face:
                yield run, face.font
                run = ""
            run, face = run + letter, other
        yield run, face.font


def label_font(label: str) -> LabelFont | None:
    """The fonts for a label, or None where some letter of it cannot be drawn here."""
    letters = [letter for letter in label if not letter.isspace()]
    leftward = any(unicodedata.bidirectional(letter) in ("R", "AL", "AN") for letter in letters)
    raqm = features.check("raqm")
    if not raqm and (leftward or any(_is_shaped(letter) for letter in letters)):
        return None
    shown = [letter for letter in letters if not (raqm and _is_invisible(letter))]
    if leftward:  # runs in several fonts would stand in the wrong order
        whole = next((face for face in _faces() if all(ord(letter) in face.letters for letter in shown)), None)
        return LabelFont(whole) if whole is not None else None
    face: Face | None = None
    for letter in shown:
        if not _belongs(letter):
            face = face_of(letter)
        if face is None or ord(letter) not in face.letters:
            return None
    return LabelFont()


def numbered(labels: Sequence[str]) -> tuple[list[str], dict[int, str]]:
    """The labels with [3] in place of the third, if that cannot be drawn; and the labels that cannot, by number."""
    unreadable = {number: label for number, label in enumerate(labels, start=1) if label_font(label) is None}
    return [f"[{n}]" if n in unreadable else label for n, label in enumerate(labels, start=1)], unreadable


@cache
def face_of(letter: str) -> Face | None:
    """The first font that has a letter, or None."""
    if letter.isspace() or letter.isascii():
        return _plain()
    return next((face for face in _faces() if ord(letter) in face.letters), None)


def has_extra_fonts() -> bool:
    """Whether the extra `fonts` is installed."""
    return all(importlib.util.find_spec(package) is not None for package, _ in PACKAGES)


def breaks_before(letter: str) -> bool:
    """Whether a line may begin with a letter: not with an accent, or with what belongs to the letter before it."""
    return not _belongs(letter)


def _belongs(letter: str) -> bool:
    """Whether a letter is drawn as a part of the one before it: accents, joiners, variation selectors, skin tones."""
    return letter in JOINERS or unicodedata.category(letter)[0] == "M" or "\U0001f3fb" <= letter <= "\U0001f3ff"


def _is_invisible(letter: str) -> bool:
    """Whether Raqm draws nothing for a letter that a font lacks."""
    return letter in JOINERS or "\ufe00" <= letter <= "\ufe0f"


def _is_shaped(letter: str) -> bool:
    return any(first <= ord(letter) < end for first, end in SHAPED)


@cache
def _plain() -> Face:
    font = ImageFont.load_default(FONT_SIZE)
    held = _letters(io.BytesIO(font.font_bytes)) if isinstance(font, ImageFont.FreeTypeFont) else range(32, 127)
    return Face(font, frozenset(held))


def _ascent(font: Font) -> float:
    return font.getmetrics()[0] if isinstance(font, ImageFont.FreeTypeFont) else FONT_SIZE


def _faces() -> Iterator[Face]:
    """Every font, opened when its turn comes."""
    yield _plain()
    for path in _paths():
        face = _opened(path)
        if face is not None:
            yield face


@cache
def _paths() -> tuple[Path, ...]:
    return (*_of_packages(), *sorted(_of_system(), key=_rank)[:MOST_FONTS])


def _of_packages() -> Iterator[Path]:
    for package, pattern in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            yield from sorted(Path(folder).glob(pattern), key=_rank)


def _of_system() -> Iterator[Path]:
    for folder in _folders():
        for root, _, files in os.walk(folder):
            yield from (Path(root, name) for name in files if name.lower().endswith((".ttf", ".otf", ".ttc")))


def _folders() -> Iterator[Path]:
    home = Path.home()
    if sys.platform == "win32":
        yield Path(os.environ.get("WINDIR", "C:/Windows"), "Fonts")
        yield home / "AppData/Local/Microsoft/Windows/Fonts"
    elif sys.platform == "darwin":
        yield from (Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts")
    else:
        yield from (Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), home / ".fonts")
        yield Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share", "fonts")


def _rank(path: Path) -> tuple[bool, int, int, str]:
    name = path.name.lower()
    styles = sum(part in name for part in STYLES)
    return not any(part in name for part in FAMILIES), styles, len(name), str(path)


@cache
def _opened(path: Path) -> Face | None:
    """A font at the size of labels; None for one that is damaged or has only bitmaps."""
    try:
        with open(path, "rb") as file:
            letters = _letters(file)
        font = ImageFont.truetype(str(path), FONT_SIZE)
        _regular(font)
    except Exception:  # font files fail in a dozen ways, and another one may do
        return None
    return Face(font, letters)


def _letters(file: io.BytesIO | io.BufferedReader) -> frozenset[int]:
    from fontTools.ttLib import TTCollection, TTFont

    start = file.read(4)
    file.seek(0)
    font = TTCollection(file, lazy=True).fonts[0] if start == b"ttcf" else TTFont(file, lazy=True)
    if not {"glyf", "CFF ", "CFF2"} & set(font.keys()):
        return frozenset()
    return frozenset(font.getBestCmap() or ())


def _regular(font: ImageFont.FreeTypeFont) -> None:
    """Give a variable font its regular weight."""
    try:
        axes = font.get_variation_axes()
    except (OSError, NotImplementedError):
        return  # it is not variable
    font.set_variation_by_axes([_regular_value(axis) for axis in axes])


def _regular_value(axis: Any) -> float:
    if axis["name"] != b"Weight":
        return float(axis["default"])
    return float(min(max(400, axis["minimum"]), axis["maximum"]))
