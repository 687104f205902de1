"""Contact sheets: every image in its place, labels that fit, and a file that says what is on it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdcli.errors import CannotWrite
from sdcli.images.contact_sheet import GAP, KEY, LABEL_WIDTH, _clean, _wrapped, contact_sheet, write_sheet
from sdcli.images.label_fonts import LabelFont
from sdcli.io.files import AlreadyExists


def plain(colour: str, width: int = 16, height: int = 16) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def noise(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ink(image: Image.Image) -> tuple[int, int, int, int] | None:
    """The box of all that is not white."""
    return Image.eval(image, lambda level: 255 - level).getbbox()


def test_every_image_stands_unchanged_in_its_place() -> None:
    images = [noise(seed, 20, 12) for seed in range(7)]
    sheet = contact_sheet(images, columns=3)
    assert sheet.mode == "RGB"
    assert sheet.size == (GAP + 3 * (20 + GAP), GAP + 3 * (12 + GAP))
    for number, image in enumerate(images):
        left, top = GAP + number % 3 * (20 + GAP), GAP + number // 3 * (12 + GAP)
        assert sheet.crop((left, top, left + 20, top + 12)).tobytes() == image.tobytes()
        sheet.paste("white", (left, top, left + 20, top + 12))
    assert ink(sheet) is None


def test_images_of_other_sizes_are_centred_in_equal_cells() -> None:
    sheet = contact_sheet([plain("red", 30, 10), plain("blue", 10, 20)], columns=2)
    assert sheet.size == (GAP + 2 * (30 + GAP), GAP + 20 + GAP)
    assert ink(sheet.crop((0, 0, GAP + 30, sheet.height))) == (GAP, GAP + 5, GAP + 30, GAP + 15)
    assert ink(sheet.crop((GAP + 30 + GAP, 0, sheet.width, sheet.height))) == (10, GAP, 20, GAP + 20)


def test_columns_are_chosen_when_none_are_given_and_never_more_than_images() -> None:
    assert contact_sheet([plain("red")] * 9).size == (GAP + 3 * (16 + GAP),) * 2
    assert contact_sheet([plain("red")] * 2, columns=8).width == GAP + 2 * (16 + GAP)


def test_transparent_parts_are_white_in_every_mode() -> None:
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    palette = plain("red").quantize(4)
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert ink(contact_sheet([clear, clear.convert("LA"), palette])) is None
    assert contact_sheet([Image.new("1", (16, 16)), Image.new("L", (16, 16))]).getpixel((GAP, GAP)) == (0, 0, 0)


def test_small_images_can_be_enlarged_without_blurring() -> None:
    sheet = contact_sheet([noise(0, 8, 8)], enlarge=3)
    shown = sheet.crop((GAP, GAP, GAP + 24, GAP + 24))
    assert shown.tobytes() == noise(0, 8, 8).resize((24, 24), Image.Resampling.NEAREST).tobytes()


def test_labels_stand_below_their_image_and_stay_in_their_cell() -> None:
    labels = ["", "a red fox in the deep snow of a very long winter night", "W" * 200, "short"]
    sheet = contact_sheet([plain("white")] * 4, columns=4, labels=labels)
    cell = LABEL_WIDTH + GAP
    boxes = [
        ink(sheet.crop((GAP + at * cell - GAP // 2, 0, GAP + (at + 1) * cell - GAP // 2, sheet.height)))
        for at in range(4)
    ]
    assert boxes[0] is None
    for box in boxes[1:]:
        assert box is not None
        left, top, right, bottom = box
        assert left >= GAP // 2
        assert right <= GAP // 2 + LABEL_WIDTH + 1
        assert top >= GAP + 16
        assert bottom <= sheet.height - 1
    assert boxes[1][3] - boxes[1][1] > 2 * (boxes[3][3] - boxes[3][1]) - 4  # two lines


@pytest.mark.parametrize(
    "text", ["a red fox", "x" * 500, "a " * 300, "one\ttwo\nthree \x1b[31m four", "\u4e2d\u6587 " * 40, " "]
)
@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_wrapped_label_loses_nothing_but_what_it_says_it_cut(text: str, most: int) -> None:
    font = LabelFont()
    text = _clean(text)
    lines = _wrapped(text, font, 80, most)
    assert len(lines) <= most
    assert all(font.getlength(line) <= 80 for line in lines)
    letters = "".join(letter for letter in text if letter.isprintable() and letter != " ")
    shown = "".join(lines).replace(" ", "")
    if shown != letters:
        assert lines[-1].endswith("...")
        assert letters.startswith(shown.removesuffix("..."))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="needs an image"):
        contact_sheet([])
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        contact_sheet([plain("red")] * 2, labels=["a"])


def test_a_sheet_is_written_whole_with_what_is_on_it(tmp_path: Path) -> None:
    settings = {"step": 500, "prompts": ["a fox\nin snow", "\u4e2d\ud800"], "seed": 3}
    sheet = contact_sheet([plain("red"), plain("blue")])
    write_sheet(tmp_path / "deep" / "sheet.png", sheet, settings)
    with Image.open(tmp_path / "deep" / "sheet.png") as opened:
        assert json.loads(opened.text[KEY]) == settings  # type: ignore[attr-defined]
        assert opened.tobytes() == sheet.tobytes()
    first = (tmp_path / "deep" / "sheet.png").read_bytes()
    with pytest.raises(AlreadyExists):
        write_sheet(tmp_path / "deep" / "sheet.png", sheet, {})
    write_sheet(tmp_path / "deep" / "sheet.png", sheet, settings, overwrite=True)
    assert (tmp_path / "deep" / "sheet.png").read_bytes() == first
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite):
        write_sheet(tmp_path / "file" / "sheet.png", sheet, {})
    assert os.listdir(tmp_path / "deep") == ["sheet.png"]
