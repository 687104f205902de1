"""`sdcli gallery`: what is in the page, how the command ends, and the page in a real browser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, PngImagePlugin
from typer.testing import CliRunner, Result

from sdcli.cli.app import app
from sdcli.errors import BadImage, CannotWrite, NotFound, SomeFailed, UsageError
from sdcli.generation.resolve.resolve import resolve
from sdcli.io.files import AlreadyExists
from sdcli.metadata import gallery
from sdcli.metadata.embed import image_bytes
from sdcli.metadata.record import Record
from sdcli.models.registry import load_registry
from sdcli.request.command_line import command_line
from sdcli.request.schema import MAX_SEED, SCHEMA, GenerationRequest
from tests.browser import Browser, browser
from tests.conftest import Run

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'\x1b\u202e\u2028"
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def request(**changes: Any) -> GenerationRequest:
    return resolve(GenerationRequest(**{"prompt": "a fox", "seed": 7, **changes}), load_registry().find("starter"))


def sample(path: Path, *, colour: str = "teal", record: Record | None = None, **changes: Any) -> Path:
    """A small image with sdcli's record of a request with these changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = record or Record(request(**changes), {"sdcli": "0.1.0", "weights": {"unet": "sha256:0"}})
    path.write_bytes(image_bytes(Image.new("RGB", (48, 32), colour), "png", record))
    return path


class Parts(HTMLParser):
    """A page as an HTML parser reads it: its tags with their attributes, and what stands in its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts.append(data)

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


# The page as text


@given(title=TEXTS, texts=st.lists(st.dictionaries(st.text(), st.text() | st.none() | st.integers()), max_size=4))
@settings(max_examples=25)
@example("@images@ @title@ @script@", [{"@images@": "@title@"}])
@example("</script><!--", [{"<!--<script>": "]]>&lt;\u2028"}, {"__proto__": "\ud800"}])
def test_whatever_the_data_holds_a_parser_reads_it_back_and_sees_no_other_tag(title: str, texts: list[Any]) -> None:
    page = "".join(gallery.page(title, texts))
    parts = Parts(page)
    assert parts.tags == Parts("".join(gallery.page("", []))).tags
    assert parts.data == {"title": title, "pictures": texts}


def test_the_policy_allows_the_page_s_own_script_and_style_by_digest_and_no_network() -> None:
    page = "".join(gallery.page("", []))
    (policy,) = [one["content"] for _, one in Parts(page).tags if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for kind in ("script", "style"):
        source = page.split(f"<{kind}>")[1].split(f"</{kind}>")[0]
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "'self' data: file:"
    assert page.isascii() or all(letter in "←→✕⇄—…" for letter in page if not letter.isascii())


# The command


def test_the_page_holds_every_record_exactly_and_a_thumbnail(tmp_path: Path) -> None:
    record = Record(request(prompt=EVIL, seed=MAX_SEED), {"weights": {"unet": "sha256:0"}, "odd": EVIL})
    sample(tmp_path / "sub" / "a#b c%.png", record=record)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "a hare\nNegative prompt: fog\nSteps: 20, Seed: 5, ENSD: 31337")
    Image.new("RGB", (600, 300)).save(tmp_path / "theirs.png", pnginfo=chunks)
    Image.new("L", (8, 8)).save(tmp_path / "bare.webp")

    result = run("gallery", tmp_path, "--json")
    page = tmp_path / "gallery.html"
    assert json.loads(result.stdout) == {"path": str(page), "status": "done", "pictures": 3, "failed": 0}
    bare, theirs, own = Parts(page.read_text(encoding="utf-8")).data["pictures"]
    assert [one["name"] for one in (bare, theirs, own)] == ["bare.webp", "theirs.png", "sub/a#b c%.png"]
    assert own["url"] == "sub/a%23b%20c%25.png"
    assert own["request"] == {
        name: value if isinstance(value, str) else json.dumps(value) for name, value in record.request.typed().items()
    }
    assert own["provenance"] == {"weights": '{"unet": "sha256:0"}', "odd": EVIL}
    assert own["command"] == command_line(record.request)
    assert (theirs["source"], theirs["request"]["negative_prompt"], theirs["request"]["seed"]) == ("a1111", "fog", "5")
    assert theirs["parameters"].startswith("a hare\n")
    assert theirs["unmapped"]["ENSD"] == "31337"
    assert theirs["size"] == "600 × 300 png"
    assert (bare["request"], bare["command"], bare["source"]) == ({}, None, None)
    assert all(one["thumbnail"].startswith("data:image/webp;base64,") for one in (bare, own, theirs))


def test_the_same_folder_gives_the_same_page_and_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    sample(tmp_path / "a.png")
    page = tmp_path / "pages" / "all.html"
    assert run("gallery", tmp_path, "-o", page).exit_code == 0
    first = page.read_bytes()
    assert isinstance(run("gallery", tmp_path, "-o", page).exception, AlreadyExists)
    assert run("gallery", tmp_path, "-o", page, "--overwrite").exit_code == 0
    assert page.read_bytes() == first
    assert Parts(first.decode()).data["pictures"][0]["url"] == "../a.png"


@pytest.mark.slow
def test_broken_images_and_circles_of_links_do_not_end_it(sdcli: Run, tmp_path: Path) -> None:
    whole = sample(tmp_path / "in" / "deep" / "whole.png").read_bytes()
    (tmp_path / "in" / "cut.png").write_bytes(whole[:-30])
    (tmp_path / "in" / "\x1b[31m.jpg").write_bytes(b"no image")
    (tmp_path / "in" / "deep" / "round").symlink_to(tmp_path / "in", target_is_directory=True)
    (tmp_path / "in" / "self.png").symlink_to("self.png")
    os.mkfifo(tmp_path / "in" / "pipe.png")
    done = sdcli("gallery", "in", "--json")
    assert done.returncode == 7, done.stderr
    *failed, last = map(json.loads, done.stdout.splitlines())
    assert last == {"path": "in/gallery.html", "status": "done", "pictures": 1, "failed": 4}
    assert {one["path"] for one in failed} == {"in/cut.png", "in/\x1b[31m.jpg", "in/self.png", "in/pipe.png"}
    assert {one["status"] for one in failed} == {"failed"}
    assert done.stderr.count("warning: ") == 4
    assert "\x1b" not in done.stderr
    assert len(Parts((tmp_path / "in" / "gallery.html").read_text()).data["pictures"]) == 1


@pytest.mark.parametrize(("count", "error"), [(1, BadImage), (2, SomeFailed)])
def test_without_any_image_that_can_be_read_no_page_is_written(count: int, error: type, tmp_path: Path) -> None:
    for number in range(count):
        (tmp_path / f"{number}.png").touch()
    assert isinstance(run("gallery", tmp_path).exception, error)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{number}.png" for number in range(count)]


def test_mistakes_are_told(tmp_path: Path) -> None:
    image = sample(tmp_path / "in" / "a.png")
    (tmp_path / "empty").mkdir()
    assert isinstance(run("gallery", tmp_path / "nowhere").exception, NotFound)
    assert isinstance(run("gallery", image).exception, NotFound)
    assert isinstance(run("gallery", tmp_path / "empty").exception, NotFound)
    assert isinstance(run("gallery", image.parent, "-o", image, "--overwrite").exception, UsageError)
    assert isinstance(run("gallery", image.parent, "-o", image / "page.html").exception, CannotWrite)
    assert list((tmp_path / "empty").iterdir()) == []


def thumbnail(image: Image.Image, path: Path, **options: Any) -> Image.Image:
    image.save(path, **options)
    (entry,) = gallery.read_entries([path])
    assert entry.thumbnail is not None, entry.error
    return Image.open(io.BytesIO(entry.thumbnail))


def test_thumbnails_are_small_upright_and_of_the_same_colours(tmp_path: Path) -> None:
    wide = Image.new("RGB", (900, 300), "white")
    ImageDraw.Draw(wide).rectangle((0, 0, 449, 300), fill="black")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: what is left comes to the top
    turned = thumbnail(wide, tmp_path / "turned.jpg", exif=exif).convert("L")
    assert turned.size == (64, 192)
    assert turned.getpixel((32, 20)) < 30 < 220 < turned.getpixel((32, 170))  # type: ignore[operator]
    deep = thumbnail(Image.new("I;16", (300, 300), 32768), tmp_path / "deep.png").convert("L")
    assert abs(deep.getpixel((96, 96)) - 127) < 4  # type: ignore[operator]
    clear = thumbnail(Image.new("RGBA", (16, 16), (255, 0, 0, 0)), tmp_path / "clear.png")
    assert (clear.size, clear.convert("RGBA").getpixel((8, 8))[3]) == ((16, 16), 0)  # type: ignore[index]


def test_of_very_many_images_no_thumbnails_are_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "MOST_EMBEDDED", 1)
    paths = [sample(tmp_path / name) for name in ("a.png", "b.png")]
    assert [entry.thumbnail for entry in gallery.read_entries(paths)] == [None, None]
    assert next(gallery.read_entries(paths[:1])).thumbnail is not None


# In a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as started:
        yield started


def captions(chromium: Browser) -> Any:
    return chromium.run("[...document.querySelectorAll('#grid .open span')].map(one => one.textContent)")


def enter(chromium: Browser, field: str, value: str) -> None:
    chromium.run(f"$({field!r}).value = {json.dumps(value)}; $({field!r}).dispatchEvent(new Event('input'))")


@pytest.mark.slow
def test_hostile_metadata_is_shown_as_text_and_nothing_is_fetched(chromium: Browser, tmp_path: Path) -> None:
    record = Record(request(prompt=EVIL, negative_prompt="x" * 300_000), {EVIL: EVIL, "__proto__": {"a": [EVIL]}})
    image = sample(tmp_path / "javascript:alert(1)#<b>.png", record=record)
    assert run("gallery", tmp_path).exit_code == 0
    chromium.open(tmp_path / "gallery.html")
    before = chromium.run("document.scripts.length")
    chromium.run("document.querySelector('.open').click()")
    assert chromium.run("document.querySelector('#facts td').textContent") == str(SCHEMA)
    shown = chromium.run("[...document.querySelectorAll('#facts tr')].map(one => one.innerText)")
    assert sum("owned" in row for row in shown) == 3
    assert sum("x" * 300_000 in row for row in shown) == 1
    assert chromium.run("$('name').textContent") == image.name
    assert chromium.run("$('generating').hidden") is True  # no argument of a command can be so long
    assert chromium.run("document.querySelectorAll('b, #facts img, #facts script').length") == 0
    assert chromium.run("[document.title, document.scripts.length]") == [tmp_path.name, before]
    chromium.run("document.querySelector('#large img').decode()")
    assert chromium.run("document.querySelector('#large img').naturalWidth") == 48
    assert set(chromium.requests) == {(tmp_path / "gallery.html").as_uri(), image.as_uri()}
    assert chromium.problems == []


@pytest.mark.slow
def test_images_are_filtered_sorted_opened_compared_and_their_command_copied(chromium: Browser, tmp_path: Path) -> None:
    big = 2**63 - 1
    sample(tmp_path / "1.png", prompt="a red fox", seed=big, steps=9)
    sample(tmp_path / "2.png", prompt="A fox, blue", seed=big - 1, steps=10)
    sample(tmp_path / "3.png", record=Record(GenerationRequest(prompt="a hare", model="other", seed=9), {}))
    Image.new("RGB", (8, 8)).save(tmp_path / "4.png")
    assert run("gallery", tmp_path).exit_code == 0
    chromium.open(tmp_path / "gallery.html")
    assert captions(chromium) == ["a red fox", "A fox, blue", "a hare", "4.png"]

    enter(chromium, "words", "FOX a")
    assert captions(chromium) == ["a red fox", "A fox, blue"]
    enter(chromium, "seed", str(big))  # beyond what JavaScript's numbers tell apart
    assert captions(chromium) == ["a red fox"]
    assert chromium.run("$('count').textContent") == "1 of 4"
    enter(chromium, "words", "")
    enter(chromium, "seed", "")
    enter(chromium, "model", "other")
    assert captions(chromium) == ["a hare"]
    enter(chromium, "model", "")
    enter(chromium, "sort", "request.seed")
    assert captions(chromium) == ["a hare", "A fox, blue", "a red fox", "4.png"]
    enter(chromium, "sort", "request.steps")
    assert captions(chromium)[:2] == ["a red fox", "A fox, blue"]

    chromium.run("document.querySelector('#grid .open').focus()")
    for key in ("c", "ArrowRight", "c"):
        chromium.press(key)
    chromium.run("$('compare').click()")
    rows = chromium.run("[...$('differences').rows].map(row => [...row.cells].map(cell => cell.textContent))")
    assert rows == [
        ["prompt", "a red fox", "A fox, blue"], ["seed", str(big), str(big - 1)], ["steps", "9", "10"],
    ]  # fmt: skip
    chromium.press("Escape")

    chromium.run("document.querySelectorAll('#grid .open')[1].focus()")
    chromium.press("Enter")
    chromium.press("ArrowLeft")
    chromium.run("document.querySelector('[data-step=\"1\"]').click()")
    chromium.run("document.querySelector('[data-step=\"-1\"]').click()")
    assert chromium.run("[$('one').open, $('name').textContent]") == [True, "1.png"]
    command = command_line(request(prompt="a red fox", seed=big, steps=9))
    chromium.run("navigator.clipboard.writeText = async text => { window.copied = text }; $('copy').click()")
    assert chromium.run("[window.copied, $('copied').textContent]") == [command, "Copied."]
    chromium.run("$('copied').textContent = ''; navigator.clipboard.writeText = async () => { throw 0 }")
    chromium.run("document.oncopy = () => { window.copied = String(document.getSelection()) }; $('copy').click()")
    assert chromium.run("[window.copied, $('copied').textContent]") == [command, "Copied."]
    chromium.press("Escape")
    chromium.wait_for("!$('one').open && document.activeElement.title === '1.png'")
    assert chromium.problems == []


@pytest.mark.slow
def test_ten_thousand_images_are_in_the_page_and_few_in_the_document(chromium: Browser, tmp_path: Path) -> None:
    (entry,) = gallery.read_entries([sample(tmp_path / "a.png")])
    page = tmp_path / "gallery.html"
    like = gallery.entry_json(entry, name="", page=page, command="sdcli generate")
    images = ({**like, "name": f"{n}.png", "request": {"prompt": f"fox {n}", "seed": str(n)}} for n in range(10_000))
    page.write_text("".join(gallery.page("many", images)), encoding="utf-8")
    chromium.open(page)
    most = chromium.run("""(async () => {
        let most = 0;
        for (let top = 0; top < document.documentElement.scrollHeight; top += 9000) {
            scrollTo(0, top);
            await new Promise(requestAnimationFrame);
            most = Math.max(most, document.getElementsByTagName("*").length);
        }
        return most;
    })()""")
    assert 100 < most < 600
    chromium.run("document.querySelector('#grid .open').focus()")
    chromium.press("End")
    assert chromium.run("document.activeElement.title") == "9999.png"
    inside = (
        "(({ top, bottom }) => top >= 0 && bottom <= innerHeight + 1)(document.activeElement.getBoundingClientRect())"
    )
    assert chromium.run(inside)
    order = "[...document.querySelectorAll('#grid li')].map(one => Number(one.ariaPosInSet))"
    assert (placed := chromium.run(order)) == sorted(placed)
    enter(chromium, "words", "fox 77")
    assert chromium.run("$('count').textContent") == f"{sum('77' in str(n) for n in range(10_000))} of 10,000"
    assert chromium.problems == []
