"""`sdcli grid`: which images are on the sheet, what is said below them, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdcli.errors import BadImage, NotFound, SdcliError, SomeFailed, UsageError
from sdcli.images.contact_sheet import GAP, KEY, LABEL_WIDTH, _wrapped, check_size
from sdcli.images.formats import MAX_PIXELS
from sdcli.images.label_fonts import LabelFont
from sdcli.images.sheet_labels import labels_of, parse_fields
from sdcli.io.files import AlreadyExists
from sdcli.metadata.embed import image_bytes
from sdcli.metadata.record import Record
from sdcli.request.schema import GenerationRequest
from tests.generation.test_encode_decode import good, run

REQUEST = GenerationRequest(
    prompt="a fox", negative_prompt="", prompt_template="{prompt}", model="tiny", seed=1, width=16, height=16, steps=4,
    guidance_scale=7.5, scheduler="ddim", eta=0.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def save(name: str, colour: str = "red", **fields: Any) -> Path:
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    record = Record(REQUEST.changed(**fields), {})
    path.write_bytes(image_bytes(Image.new("RGB", (16, 16), colour), "png", record))
    return path


def labels(*arguments: str) -> list[str]:
    (facts,) = run("grid", *arguments, "-o", "sheet.png", "--overwrite", "--json").json
    return [image["label"] for image in facts["pictures"]]


def test_labels_say_what_differs_and_nothing_else() -> None:
    a, b, c = REQUEST, REQUEST.changed(seed=2), REQUEST.changed(seed=1, prompt="a\nblue  fox", guidance_scale=7)
    assert labels_of(["a", "b"], [a, b]) == ["seed 1", "seed 2"]
    assert labels_of(["a", "b", "c"], [a, b, c]) == [
        "seed 1, cfg 7.5, a fox",
        "seed 2, cfg 7.5, a fox",
        "seed 1, cfg 7, a blue fox",
    ]
    assert labels_of(["a", "b"], [a, a.changed(width=24)]) == ["16x16", "24x16"]
    assert labels_of(["a", "b"], [a, a.changed(upscale="2x")]) == ["16x16", "32x32, upscale 2x:0.5:pixel"]
    assert labels_of(["x/a", "b"], [a, a]) == ["x/a", "b"]
    assert labels_of(["a", "b", "bare"], [a, b, None]) == ["seed 1", "seed 2", "bare"]
    assert labels_of(["a", "b"], [a, GenerationRequest(prompt="a fox", seed=2)])[1] == "seed 2"
    several = a.changed(loras=["one:0.5", "two"])
    assert labels_of(["a", "b"], [a.changed(loras=["one:0.5"]), several]) == ["loras one:0.5", "loras one:0.5 two:1"]
    assert labels_of(["a", "b"], [a, several]) == ["a", "loras one:0.5 two:1"]


def test_asked_fields_stand_in_their_order() -> None:
    fields = parse_fields("cfg-scale, name,size ,sampler")
    assert fields == ("guidance_scale", "name", "size", "scheduler")
    assert labels_of(["a"], [REQUEST], fields=fields) == ["cfg 7.5, a, 16x16, ddim"]
    assert labels_of(["a", "b"], [REQUEST, None], fields=fields) == ["cfg 7.5, a, 16x16, ddim", "b"]
    with pytest.raises(UsageError, match="none of the images records its seed or guidance scale"):
        labels_of(["a"], [None], fields=parse_fields("seed,cfg_scale"))
    for text in ("sead", "", "seed,", "none,seed", "__class__"):
        with pytest.raises(UsageError, match="a label has no field"):
            parse_fields(text)


def test_images_and_folders_become_one_sheet() -> None:
    for k, colour in enumerate(("red", "green", "blue")):
        save(f"folder/{k}.png", colour, seed=k)
    save("black.png", "black", seed=9)
    assert good("grid", "black.png", "folder", "-o", "sheet.png", "--columns", "3", "--enlarge", "2") == ["sheet.png"]
    with Image.open("sheet.png") as sheet:
        assert sheet.size == (GAP + 3 * (LABEL_WIDTH + GAP), GAP + 2 * (32 + 15 + GAP))
        middle = GAP + LABEL_WIDTH // 2
        centres = [(middle + k % 3 * (LABEL_WIDTH + GAP), GAP + 16 + k // 3 * (32 + 15 + GAP)) for k in range(4)]
        assert [sheet.getpixel(at) for at in centres] == [(0, 0, 0), (255, 0, 0), (0, 128, 0), (0, 0, 255)]
        on_it = json.loads(sheet.text[KEY])  # type: ignore[attr-defined]
    assert [(image["name"], image["request"]["seed"]) for image in on_it["pictures"]] == [
        ("black.png", 9), ("0.png", 0), ("1.png", 1), ("2.png", 2)
    ]  # fmt: skip


def test_a_second_sheet_in_the_same_folder_does_not_show_the_first() -> None:
    save("folder/a.png", seed=1)
    save("folder/b.png", seed=2)
    good("grid", "folder", "-o", "folder/sheet.png")
    before = Path("folder/sheet.png").read_bytes()
    assert isinstance(run("grid", "folder", "-o", "folder/sheet.png").error, AlreadyExists)
    good("grid", "folder", "-o", "folder/sheet.png", "--overwrite")
    assert Path("folder/sheet.png").read_bytes() == before
    outcome = run("grid", "folder/sheet.png", "-o", "folder/sheet.png", "--overwrite")
    assert isinstance(outcome.error, NotFound)


def test_labels_are_chosen_or_left_out() -> None:
    save("a.png", seed=1)
    save("b.png", seed=2, steps=8)
    assert labels("a.png", "b.png") == ["seed 1, steps 4", "seed 2, steps 8"]
    assert labels("a.png", "b.png", "--label", "prompt,name") == ["a fox, a", "a fox, b"]
    assert labels("a.png", "b.png", "--label", "none") == [None, None]
    with Image.open("sheet.png") as sheet:
        assert sheet.size == (GAP + 2 * (16 + GAP), GAP + 16 + GAP)


def test_one_unreadable_image_is_reported_and_the_others_are_laid_out() -> None:
    save("a.png", seed=1)
    save("b.png", seed=2)
    Path("cut.png").write_bytes(Path("a.png").read_bytes()[:60])
    outcome = run("grid", "a.png", "cut.png", "absent.png", "b.png", "-o", "sheet.png", "--json")
    assert isinstance(outcome.error, SomeFailed)
    assert "cut.png" in outcome.err
    (facts,) = outcome.json
    assert [image["label"] for image in facts["pictures"]] == ["seed 1", "seed 2"]
    assert len(facts["failed"]) == 2
    cases: list[tuple[list[str], type[SdcliError]]] = [
        (["cut.png"], BadImage),
        (["absent.png"], NotFound),
        (["cut.png", "absent.png"], SomeFailed),
    ]
    for names, error in cases:
        assert type(run("grid", *names, "-o", "none.png").error) is error
        assert not Path("none.png").exists()


def test_wrong_wishes_are_refused() -> None:
    save("a.png")
    Path("empty").mkdir()
    assert "should end in .png" in str(run("grid", "a.png", "-o", "sheet.jpg").error)
    assert "did you mean 'seed'" in str(run("grid", "a.png", "-o", "s.png", "--label", "sead").error)
    assert isinstance(run("grid", "empty", "-o", "s.png").error, NotFound)
    assert not Path("s.png").exists()


def test_a_sheet_too_large_to_be_read_again_is_refused_before_it_is_made() -> None:
    check_size(200, (512, 512))
    with pytest.raises(UsageError, match=r"300 images of up to 512x512 pixels are too many"):
        check_size(300, (512, 512))
    with pytest.raises(UsageError):
        check_size(1, (512, 512), enlarge=16)
    with pytest.raises(UsageError):
        check_size(MAX_PIXELS // (LABEL_WIDTH * 15), (1, 1))
    Image.fromarray(np.zeros((400, 400), dtype=np.uint8)).save("large.png")
    assert "too many for one sheet" in str(run("grid", "large.png", "-o", "s.png", "--enlarge", "64").error)


def test_a_label_breaks_where_it_has_line_breaks() -> None:
    font = LabelFont()
    assert _wrapped("t 5\nalpha-bar 0.5\n\nSNR 0 dB", font, 200, 3) == ["t 5", "alpha-bar 0.5", "SNR 0 dB"]
    assert _wrapped("t 5\nalpha-bar 0.5\nSNR 0 dB", font, 200, 2) == ["t 5", "alpha-bar 0.5..."]
