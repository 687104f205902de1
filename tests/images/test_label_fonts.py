"""Labels in every script: what is drawn can be read, and what cannot be drawn is a number and a text file."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageDraw, ImageFont, features

from sdcli.images import label_fonts
from sdcli.images.contact_sheet import GAP, UNREADABLE, contact_sheet, write_sheet
from sdcli.images.label_fonts import FONT_SIZE, LabelFont, face_of, label_font
from sdcli.io.files import AlreadyExists
from tests.generation.test_encode_decode import run

DRAWN = [
    "рыжая лиса",
    "ґЖ ё",
    "αλεπού στο χιόνι",
    "ثعلب أحمر في الثلج",
    "שועל אדום",
    "café ŽÅ ñ",
    "შავი",
    "→ × …",
    "cafe\u0301",
]
"""Labels that matplotlib's font has."""
EXTRA = [
    "狐",
    "雪中的红狐狸",
    "여우",
    "キツネ",
    "จิ้งจอก",
    "लाल लोमड़ी",
    "শিয়াল",
    "🦊 fox ❄️",
    "👍🏽👩‍🚀",
    "seed 3, 狐 и лис",
]
"""Labels that need the fonts of the extra `fonts`, or of the system."""
HAS_EXTRA = label_fonts.has_extra_fonts()


@pytest.fixture
def packaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other fonts than Pillow's and matplotlib's."""
    only(monkeypatch, [path for path in label_fonts._of_packages() if path.name == "DejaVuSans.ttf"])


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other font than Pillow's own."""
    only(monkeypatch, [])


def only(monkeypatch: pytest.MonkeyPatch, paths: list[Path]) -> None:
    monkeypatch.setattr(label_fonts, "_paths", lambda: tuple(paths))
    monkeypatch.setattr(label_fonts, "face_of", label_fonts.face_of.__wrapped__)


def sheet_of(*labels: str, width: int = 200) -> Image.Image:
    return contact_sheet([Image.new("RGB", (width, 8), "white")] * len(labels), labels=labels, columns=1)


def is_box(letter: str, font: Any) -> bool:
    """Whether a font draws a letter as it draws one that no font has."""
    return bytes(font.getmask(letter)) == bytes(font.getmask("\U0010fffe"))


@pytest.mark.parametrize("label", DRAWN)
def test_labels_in_the_scripts_of_matplotlibs_font_are_drawn(label: str, packaged: None) -> None:
    sheet = sheet_of(label)
    assert UNREADABLE not in sheet.info
    assert ImageChops.invert(sheet).getbbox() is not None
    no_boxes(unicodedata.normalize("NFC", label))


@pytest.mark.skipif(not HAS_EXTRA, reason="the extra `fonts` is not installed")
@pytest.mark.parametrize("label", EXTRA)
def test_labels_in_other_scripts_are_drawn_with_the_extra_fonts(label: str) -> None:
    assert UNREADABLE not in sheet_of(label).info
    no_boxes(label)


def no_boxes(label: str) -> None:
    font = label_font(label)
    assert font is not None
    for part, used in font._runs(label):
        for letter in part:
            if not letter.isspace() and not label_fonts._belongs(letter):
                assert not is_box(letter, used), (letter, used)


def test_a_label_of_ascii_is_drawn_as_pillow_draws_it(bare: None) -> None:
    label = "seed 3, cfg 7.5: a (red) fox & [co]"
    sheet = sheet_of(label, width=300)
    font = ImageFont.load_default(FONT_SIZE)
    expected = Image.new("RGB", sheet.size, "white")
    left = GAP + (300 - font.getlength(label)) / 2
    ImageDraw.Draw(expected).text((left, GAP + 8), label, fill="black", font=font)
    assert sheet.tobytes() == expected.tobytes()


@pytest.mark.skipif(not features.check("raqm"), reason="this Pillow has no Raqm")
def test_right_to_left_is_drawn_from_right_to_left_and_arabic_is_joined(packaged: None) -> None:
    hebrew, arabic = "שועל אדום", "ثعلب"
    face = label_font(hebrew)
    assert face is not None
    assert face.whole is not None
    font: Any = face.whole.font
    basic = ImageFont.truetype(font.path, FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    drawn, backwards, forwards = (Image.new("L", (100, 20)) for _ in range(3))
    ImageDraw.Draw(drawn).text((2, 2), hebrew, fill=255, font=font)
    ImageDraw.Draw(backwards).text((2, 2), hebrew[::-1], fill=255, font=basic)
    ImageDraw.Draw(forwards).text((2, 2), hebrew, fill=255, font=basic)
    near, far = (sum(ImageChops.difference(drawn, other).tobytes()) for other in (backwards, forwards))
    assert near < far / 2  # the two layouts kern differently
    assert LabelFont(face.whole).getlength(arabic) < sum(basic.getlength(letter) for letter in arabic)


def test_without_raqm_what_needs_it_is_not_drawn(packaged: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_fonts.features, "check", lambda name: False)  # type: ignore[attr-defined]
    assert label_font("лиса") is not None
    assert all(label_font(label) is None for label in ("שועל", "ثعلب", "लाल", "a\u200db"))


def test_a_label_that_cannot_be_drawn_is_a_number_and_a_text_file(bare: None, tmp_path: Path) -> None:
    sheet = sheet_of("a fox", "狐\nи кот", "fox")
    assert sheet.info[UNREADABLE] == {2: "狐\nи кот"}
    assert sheet.tobytes() == sheet_of("a fox", "[2]", "fox").tobytes()
    beside = write_sheet(tmp_path / "sheet.png", sheet, {"x": 1})
    assert beside == (tmp_path / "sheet.labels.txt",)
    assert beside[0].read_text(encoding="utf-8") == "[2] 狐\nи кот\n"
    (tmp_path / "sheet.png").unlink()
    with pytest.raises(AlreadyExists, match=r"sheet\.labels\.txt"):
        write_sheet(tmp_path / "sheet.png", sheet, {})
    assert not (tmp_path / "sheet.png").exists()
    assert write_sheet(tmp_path / "plain.png", sheet_of("a fox"), {}) == ()


def test_damaged_fonts_and_bitmap_fonts_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"\0\1\0\0 no font")
    (tmp_path / "empty.ttc").write_bytes(b"ttcf")
    (dejavu,) = (path for path in label_fonts._of_packages() if path.name == "DejaVuSans.ttf")
    only(monkeypatch, [tmp_path / "broken.ttf", tmp_path / "empty.ttc", tmp_path / "none.otf", dejavu])
    assert label_font("лиса") is not None


def test_fonts_of_the_system_come_last_and_those_with_many_letters_first() -> None:
    names = ["Zapfino.ttf", "NotoSansCJK-Regular.ttc", "NotoSansCJK-Bold.ttc", "NotoSerif-BoldItalic.ttf", "Aria.otf"]
    order = sorted((Path("/fonts", name) for name in names), key=label_fonts._rank)
    assert [path.name for path in order] == [names[1], names[2], names[3], names[4], names[0]]


# The commands


def test_a_sweep_over_prompts_in_other_scripts_says_where_its_labels_are(
    bare: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("generate", "-m", "tiny", "--steps", "1", "--seed", "1", "--sweep", "prompt=狐,кот,fox", "--outdir", "s")
    assert done.error is None, done.error
    assert "the numbers on the sheet are explained in s/sweep.labels.txt" in done.err
    assert Path("s/sweep.labels.txt").read_text(encoding="utf-8") == "[1] 狐\n[2] кот\n"


def test_grid_says_where_its_labels_are(bare: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("狐", "fox"):
        Image.new("RGB", (16, 16), "red").save(f"{name}.png")
    done = run("grid", "fox.png", "狐.png", "-o", "sheet.png", "--json")
    assert done.error is None, done.error
    assert json.loads(done.out[0])["pictures"][1]["label"] == "狐"
    assert "explained in sheet.labels.txt" in done.err
    assert Path("sheet.labels.txt").read_text(encoding="utf-8") == "[2] 狐\n"


# Any label

ODD = ["a fox", "\n", "\u200d", "\ufe0f", "\u0301", "\u202e", "\ud800"]
TEXTS = st.one_of(
    st.text(max_size=20),
    st.lists(st.sampled_from([*DRAWN, *EXTRA, "a fox", "\n", "\u200d", "\ufe0f", "\u0301", "\u202e", "\ud800"])).map(
        "".join
    ),
)


def is_drawn_or_told(label: str) -> None:
    sheet = sheet_of(label, "plain")
    told = sheet.info.get(UNREADABLE, {})
    if 1 in told:
        assert sheet.tobytes() == sheet_of("[1]", "plain").tobytes()
        return
    text = unicodedata.normalize("NFC", label).encode(errors="replace").decode()
    no_boxes("".join(letter if letter.isprintable() else " " for letter in text))


@given(TEXTS)
@example("a\u0301\u0302\u0303")
@example("\u0301")
@settings(max_examples=60)
def test_any_label_is_drawn_without_boxes_or_told(label: str) -> None:
    is_drawn_or_told(label)


@pytest.mark.slow
@given(TEXTS)
@settings(max_examples=500, suppress_health_check=list(HealthCheck))
def test_many_labels_are_drawn_without_boxes_or_told(label: str) -> None:
    is_drawn_or_told(label)


def test_the_font_of_a_letter_has_it() -> None:
    found = {letter: face_of(letter) for letter in "aéжש→"}
    assert all(face is not None and ord(letter) in face.letters for letter, face in found.items())
    assert face_of("\U0010fffe") is None
