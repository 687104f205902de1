"""The web page in a real browser, with a server whose jobs are played by the test."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image, PngImagePlugin

from sdcli.metadata.embed import image_bytes
from sdcli.metadata.record import Record
from sdcli.request.command_line import command_line
from sdcli.request.schema import parse_request
from tests.browser import Browser, browser
from tests.server.idle import IdleServer, idle_server

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'\u202e\u2028"
PROMPT = "a red fox"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture
def idle() -> Iterator[IdleServer]:
    with idle_server() as running:
        yield running


@pytest.fixture
def page(chromium: Browser, idle: IdleServer) -> Browser:
    return opened(chromium, idle.url)


def opened(chromium: Browser, url: str) -> Browser:
    """The page of a server, ready, in a window of usual size."""
    chromium.resize(1280, 900)
    chromium.emulate()
    chromium.open(url)
    ready(chromium)
    return chromium


def ready(page: Browser) -> None:
    """Wait until the page knows what the server can do."""
    page.run("window.$ = id => document.getElementById(id)")
    page.wait_for("$('model').value !== ''")


def enter(page: Browser, **fields: str) -> None:
    """Type values into fields, by their ids."""
    for name, value in fields.items():
        page.run(f"$({name!r}).focus(); $({name!r}).select?.()")
        page.type(value)


def submitted(page: Browser, idle: IdleServer) -> Any:
    """Press Generate, and return the job that the server has then."""
    before = len(idle.jobs)
    page.run("$('generate').click()")
    page.wait_for(f"document.querySelectorAll('.job').length + $('gallery').children.length > {before}")
    return idle.jobs[-1]


def centre(page: Browser, selector: str, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
    """A point of an element, in CSS pixels of the window."""
    box = page.run(
        f"(({{x, y, width, height}}) => [x, y, width, height])(document.querySelector({selector!r})"
        ".getBoundingClientRect())"
    )
    return box[0] + box[2] * x, box[1] + box[3] * y


def violations(page: Browser) -> list[str]:
    """What the page complains of, without answers of the server that are errors on purpose."""
    return [one for one in page.problems if '"source": "network"' not in one]


def picture(path: Path, size: tuple[int, int] = (64, 48), **texts: str) -> Path:
    """A PNG file with texts."""
    chunks = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)
    Image.new("RGB", size, "teal").save(path, pnginfo=chunks)
    return path


def text_of(page: Browser, selector: str) -> str:
    found: str = page.run(f"document.querySelector({selector!r})?.textContent ?? ''")
    return found


# Safety


def test_the_page_asks_no_other_server_and_keeps_its_strict_policy(page: Browser, idle: IdleServer) -> None:
    assert {url.split("/")[2] for url in page.requests} == {idle.url.split("/")[2]}
    assert violations(page) == []
    answer = httpx.get(idle.url)
    rules = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert "<script>" not in answer.text
    assert "<style" not in answer.text
    inline = "document.body.append(Object.assign(document.createElement('script'), {text: 'document.title = 1'}))"
    assert page.run(f"(() => {{ try {{ {inline} }} catch (error) {{ return error.name }} }})()") == "TypeError"
    assert page.run("fetch('http://127.0.0.1:1/').catch(error => error.message)") == "Failed to fetch"
    assert any("Content Security Policy" in one for one in page.problems), "the policy is in force"
    assert page.run("document.title") == "sdcli"


def test_hostile_texts_of_prompts_and_images_stay_text(page: Browser, idle: IdleServer, tmp_path: Path) -> None:
    scripts = page.run("document.scripts.length")
    chunks = (
        f"{EVIL}\nNegative prompt: {EVIL}\nSteps: 20, Seed: 5, Size: 64x64, {EVIL.replace(',', '')}: 1, odd: {EVIL}"
    )
    page.choose("#read-file", picture(tmp_path / "evil.png", parameters=chunks))
    page.wait_for("!$('taken').hidden")
    assert "owned" in page.run("$('prompt').value")
    assert "owned" in text_of(page, "#taken")
    enter(page, prompt=EVIL)
    job = submitted(page, idle)
    assert "owned" in text_of(page, ".job .prompt")
    idle.begin(job)
    idle.finish(job, failing=f"it broke: {EVIL}")
    page.wait_for("document.querySelector('.status.error')")
    assert EVIL in text_of(page, ".status.error")
    idle.finish(submitted(page, idle))
    page.wait_for("$('gallery').children.length === 1")
    page.run("document.querySelector('#gallery button').click()")
    assert EVIL in text_of(page, "#facts")
    page.run("$('copy-image').click()")
    page.wait_for("$('command-view').open")
    assert "owned" in page.run("$('command').value")
    assert page.run("document.scripts.length") == scripts
    assert page.run("document.querySelectorAll('[onerror], dd img, td img').length") == 0
    assert "owned" not in page.run("document.title")
    assert violations(page) == []


def test_a_token_is_asked_for_once_and_sent_with_everything(chromium: Browser) -> None:
    with idle_server(token="open sesame") as idle:
        chromium.open(idle.url)
        chromium.run("window.$ = id => document.getElementById(id)")
        chromium.wait_for("$('token-dialog').open")
        enter(chromium, token="guess")
        chromium.press("Enter")
        chromium.wait_for("$('token-dialog').open && !$('token-error').hidden")
        assert text_of(chromium, "#token-error") == "The server does not accept this token."
        enter(chromium, token="open sesame")
        chromium.press("Enter")
        chromium.wait_for("$('model').value !== ''")
        enter(chromium, prompt=PROMPT)
        job = submitted(chromium, idle)
        idle.begin(job)
        idle.step(job, 1, 4, preview=True)
        chromium.wait_for("document.querySelector('.job img').naturalWidth === 8")
        idle.finish(job)
        chromium.wait_for("document.querySelector('#gallery img')?.naturalWidth === 16")
        chromium.reload()
        ready(chromium)
        chromium.wait_for("document.querySelector('#gallery img')?.naturalWidth === 16")
        assert chromium.run("$('token-dialog').open") is False
        assert chromium.run("localStorage.getItem('sdcli.token')") is None, "it was not to be remembered"
        assert all("sesame" not in url for url in chromium.requests)
        assert violations(chromium) == []


# Jobs


@pytest.mark.slow
def test_a_job_shows_its_progress_and_preview_and_its_images_come_to_the_gallery(
    page: Browser, idle: IdleServer
) -> None:
    enter(page, prompt=PROMPT, num_images="2", seed="9223372036854775806", steps="7")
    job = submitted(page, idle)
    assert [one.request.seed for one in job.images] == [2**63 - 2, 2**63 - 1]
    assert text_of(page, ".status") == "Queue place 1"
    idle.begin(job)
    idle.step(job, 2, 7, preview=True)
    page.wait_for("document.querySelector('.status').textContent.includes('Step 2')")
    assert text_of(page, ".status") == "0 of 2 images · Step 2 of 7 · 2.0 it/s · 3 s left"
    assert page.run("document.querySelector('progress').value") == pytest.approx(2 / 7)
    page.wait_for("document.querySelector('.job img').naturalWidth === 8")
    idle.finish(job)
    page.wait_for("document.querySelectorAll('#gallery img[src]').length === 2")
    page.wait_for("$('jobs').children.length === 0")
    seeds = page.run("[...document.querySelectorAll('#gallery .seed')].map(one => one.textContent)")
    assert seeds == [str(2**63 - 2), str(2**63 - 1)], "exactly, beyond what JavaScript's numbers tell apart"
    assert text_of(page, "#live") == "2 images are done."


def test_places_in_the_queue_are_shown_and_waiting_jobs_cancelled(page: Browser, idle: IdleServer) -> None:
    enter(page, prompt=PROMPT)
    first, _, third = (submitted(page, idle) for _ in range(3))
    page.wait_for("document.querySelectorAll('.status')[2]?.textContent === 'Queue place 3'")
    page.run("document.querySelector('.job button').click()")
    page.wait_for("document.querySelectorAll('.job').length === 2")
    assert first.state == "cancelled"
    page.wait_for("document.querySelectorAll('.status')[1]?.textContent === 'Queue place 2'")
    page.press("Escape")
    page.wait_for("document.querySelectorAll('.job').length === 1")
    assert third.state == "cancelled", "Escape cancels what was queued last where nothing runs"


@pytest.mark.slow
def test_many_jobs_leave_connections_to_cancel_them(page: Browser, idle: IdleServer) -> None:
    enter(page, prompt=PROMPT)
    jobs = [submitted(page, idle) for _ in range(8)]
    page.run("[...document.querySelectorAll('.job button')].at(-1).click()")
    page.wait_for("document.querySelectorAll('.job').length === 7")
    for job in jobs[:-1]:
        idle.begin(job)
        idle.finish(job)
    page.wait_for("document.querySelectorAll('#gallery img[src]').length === 7")


@pytest.mark.slow
def test_a_job_and_the_settings_survive_a_reload(page: Browser, idle: IdleServer) -> None:
    enter(page, prompt=PROMPT, negative_prompt="fog", width="80", scheduler="", guidance_scale="7..3")
    page.run("$('scheduler').value = 'euler'; $('scheduler').dispatchEvent(new Event('input', {bubbles: true}))")
    page.run("$('add').value = 'clip_skip'; $('add').dispatchEvent(new Event('change', {bubbles: true}))")
    page.type("2")
    done, job = submitted(page, idle), submitted(page, idle)
    idle.begin(done)
    idle.finish(done)
    page.wait_for("$('gallery').children.length === 1")
    idle.begin(job)
    idle.step(job, 1, 4)
    page.reload()
    ready(page)
    page.wait_for("document.querySelector('.status')?.textContent.includes('Step 1 of 4')")
    idle.step(job, 2, 4)
    page.wait_for("document.querySelector('.status')?.textContent.includes('Step 2 of 4')")
    idle.finish(job)
    page.wait_for("document.querySelectorAll('#gallery img[src]').length === 2")
    again = submitted(page, idle)
    kept = {name: getattr(again.images[0].request, name) for name in ("negative_prompt", "width", "scheduler")}
    assert kept == {"negative_prompt": "fog", "width": 80, "scheduler": "euler"}
    assert (again.images[0].request.guidance_end, again.images[0].request.clip_skip) == (3, 2)


@pytest.mark.slow
def test_an_image_that_was_deleted_stays_away_after_a_reload(page: Browser, idle: IdleServer) -> None:
    enter(page, prompt=PROMPT, num_images="3", seed="1")
    idle.finish(submitted(page, idle))
    page.wait_for("$('gallery').children.length === 3")
    page.run("document.querySelectorAll('#gallery button')[1].click()")
    page.press("Delete")
    page.press("Escape")
    page.reload()
    ready(page)
    page.wait_for("document.querySelectorAll('#gallery img[src]').length === 2")
    assert page.run("[...document.querySelectorAll('.seed')].map(one => one.textContent)") == ["1", "3"]


@pytest.mark.slow
def test_a_server_that_goes_away_is_told_and_its_return_noticed(chromium: Browser) -> None:
    with idle_server() as idle:
        opened(chromium, idle.url)
        enter(chromium, prompt=PROMPT)
        submitted(chromium, idle)
        port = idle.port
    chromium.run("$('generate').click()")
    chromium.wait_for("!$('connection').hidden")
    chromium.wait_for("$('error').textContent.startsWith('The server does not answer')")
    with idle_server(port=port) as idle:
        chromium.wait_for("$('connection').hidden")
        chromium.wait_for("document.querySelector('.status.error') || !document.querySelector('.job')")
        chromium.run("$('generate').click()")
        chromium.wait_for("[...document.querySelectorAll('.status')].some(one => one.textContent === 'Queue place 1')")
        assert len(idle.jobs) == 1


def test_an_error_is_the_servers_sentence_beside_its_field(page: Browser, idle: IdleServer) -> None:
    page.run("$('add').value = 'loras'; $('add').dispatchEvent(new Event('change', {bubbles: true}))")
    page.type("../secret")
    enter(page, prompt=PROMPT, steps="4")
    page.run("$('generate').click()")
    page.wait_for("document.querySelector('#rows .error')?.textContent")
    assert text_of(page, "#rows .error").startswith("loras: should be a name that the server knows")
    page.run("document.querySelector('#rows button').click()")
    enter(page, steps="0")
    page.press("Enter", ctrl=True)
    page.wait_for("!$('error-steps')?.hidden && $('error-steps')?.textContent")
    assert text_of(page, "#error-steps").startswith("steps: ")
    attributes = "['aria-invalid', 'aria-errormessage'].map(name => $('steps').getAttribute(name))"
    assert page.run(f"[document.activeElement.id, ...{attributes}]") == ["steps", "true", "error-steps"]
    assert idle.jobs == []
    enter(page, steps="3")
    submitted(page, idle)
    assert page.run("$('steps').hasAttribute('aria-invalid') || !$('error-steps').hidden") is False


# Images that go in


@pytest.mark.slow
@pytest.mark.parametrize("touch", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_drawn_mask_reaches_the_server_white_where_it_was_painted(
    page: Browser, idle: IdleServer, tmp_path: Path, touch: bool
) -> None:
    page.choose("#start-file", picture(tmp_path / "photo.png", (128, 96)))
    page.wait_for("!$('with-start').hidden")
    page.run("$('draw').click()")
    left, right, low = (centre(page, "#mask", x, y) for x, y in ((0.1, 0.2), (0.9, 0.2), (0.5, 0.9)))
    page.drag(left, centre(page, "#mask", 0.5, 0.2), right, touch=touch)
    page.drag(low, touch=touch)
    page.run("$('undo').click()")
    page.run("$('erase').click()")
    page.drag(right, touch=touch)
    page.press("Escape")
    enter(page, prompt=PROMPT, strength="0.9")
    request = submitted(page, idle).images[0].request
    mask = Image.open(io.BytesIO(request.mask.data)).convert("L")
    assert mask.size == (128, 96)
    assert [mask.getpixel(point) for point in ((64, 19), (115, 19), (64, 86), (64, 60))] == [255, 0, 0, 0]
    assert request.init_image.data == (tmp_path / "photo.png").read_bytes(), "the file as it is"
    assert request.strength == 0.9
    page.run("$('remove-mask').click()")
    assert submitted(page, idle).images[0].request.mask is None


@pytest.mark.slow
def test_a_mask_can_be_drawn_with_keys(page: Browser, idle: IdleServer, tmp_path: Path) -> None:
    page.choose("#start-file", picture(tmp_path / "photo.png", (64, 64)))
    page.wait_for("!$('with-start').hidden")
    page.run("$('draw').focus()")
    page.press("Enter")
    page.wait_for("document.activeElement === $('mask')")
    page.press(" ")
    assert text_of(page, "#mask-live") == "Painted."
    page.press("Escape")
    assert page.run("document.activeElement === $('draw')"), "the focus is where it was"
    enter(page, prompt=PROMPT)
    mask = Image.open(io.BytesIO(submitted(page, idle).images[0].request.mask.data)).convert("L")
    assert (mask.getpixel((32, 32)), mask.getpixel((2, 2))) == (255, 0)


@pytest.mark.slow
def test_a_large_init_image_is_made_to_fit_the_limits(chromium: Browser, tmp_path: Path) -> None:
    with idle_server(max_pixels=256 * 256) as idle:
        page = opened(chromium, idle.url)
        Image.new("RGB", (800, 400), "teal").save(tmp_path / "photo.bmp")
        page.choose("#start-file", tmp_path / "photo.bmp")
        page.wait_for("!$('with-start').hidden")
        assert "photo.png, 724 × 362, scaled down from 800 × 400" in text_of(page, "#start-text")
        enter(page, prompt=PROMPT)
        request = submitted(page, idle).images[0].request
        assert Image.open(io.BytesIO(request.init_image.data)).size == (724, 362)
        assert (request.width, request.height) == (368, 176)


@pytest.mark.slow
def test_a_dropped_image_gives_its_settings_or_becomes_the_init_image(
    page: Browser, idle: IdleServer, tmp_path: Path
) -> None:
    text = "a hare\nNegative prompt: fog\nSteps: 21, Sampler: Euler a, CFG scale: 6, Seed: 5, Size: 64x48, ENSD: 31337"
    file = picture(tmp_path / "hare.png", parameters=text)
    page.drop(320, 450, file)
    page.wait_for("!$('taken').hidden")
    values = page.run("['prompt', 'negative_prompt', 'steps', 'seed', 'scheduler', 'width'].map(id => $(id).value)")
    assert values == ["a hare", "fog", "21", "5", "euler-a", "64"]
    assert page.run("[...document.querySelectorAll('#taken-left :is(dt, dd)')].map(one => one.textContent)") == [
        "ENSD", "31337",
    ]  # fmt: skip
    assert page.run("$('with-start').hidden") is True
    page.drop(960, 450, file)
    page.wait_for("!$('with-start').hidden")
    assert page.run("$('dropping').hidden") is True
    request = submitted(page, idle).images[0].request
    assert (request.seed, request.scheduler, request.init_image.data) == (5, "euler-a", file.read_bytes())
    page.choose("#read-file", picture(tmp_path / "bare.png"))
    page.wait_for("$('taken-text').textContent.startsWith('bare.png holds no settings')")
    (tmp_path / "broken.png").write_bytes(b"no image")
    page.choose("#read-file", tmp_path / "broken.png")
    page.wait_for("$('error').textContent === 'broken.png: is not a PNG, JPEG or WebP image'")


@pytest.mark.slow
def test_the_settings_of_an_own_image_make_the_same_request_again(
    page: Browser, idle: IdleServer, tmp_path: Path
) -> None:
    enter(page, prompt=PROMPT, seed=str(2**63 - 1), guidance_scale="7..3")
    page.run("$('add').value = 'upscale'; $('add').dispatchEvent(new Event('change', {bubbles: true}))")
    page.type("2x:0.6")
    job = submitted(page, idle)
    request = job.images[0].request
    idle.finish(job)
    page.wait_for("$('gallery').children.length === 1")
    page.run("$('reset').click()")
    page.run("document.querySelector('#gallery button').click(); $('use-settings').click()")
    page.wait_for("$('prompt').value !== ''")
    assert submitted(page, idle).images[0].request == request
    page.run("$('reset').click()")
    data = image_bytes(Image.new("RGB", (8, 8)), "png", Record(request, {}))
    (tmp_path / "own.png").write_bytes(data)
    page.choose("#read-file", tmp_path / "own.png")
    page.wait_for("$('prompt').value !== ''")
    assert submitted(page, idle).images[0].request == request


@pytest.mark.slow
def test_an_image_of_the_gallery_is_the_next_init_image(page: Browser, idle: IdleServer) -> None:
    enter(page, prompt=PROMPT)
    job = submitted(page, idle)
    idle.finish(job)
    page.wait_for("document.querySelector('#gallery img[src]')")
    page.run("document.querySelector('#gallery button').click()")
    page.wait_for("$('large').naturalWidth === 16")
    assert page.run("$('download').download").startswith("a-red-fox-")
    page.run("$('use-start').click()")
    page.wait_for("!$('with-start').hidden && !$('viewer').open")
    assert submitted(page, idle).images[0].request.init_image.data == job.done[0].data


@pytest.mark.slow
def test_the_command_is_that_of_the_form_and_of_an_image(page: Browser, idle: IdleServer, tmp_path: Path) -> None:
    page.run("navigator.clipboard.writeText = async text => { window.copied = text }")
    enter(page, prompt="it's $HOME", steps="3", num_images="4")
    page.run("$('copy').click()")
    page.wait_for("$('copied').textContent === 'Copied.'")
    model = page.run("$('model').value")
    expected = command_line(parse_request({"prompt": "it's $HOME", "steps": 3, "model": model}), num_images=4)
    assert page.run("[window.copied, $('command').value]") == [expected, expected]
    page.press("Escape")
    page.choose("#start-file", picture(tmp_path / "photo of.png"))
    page.wait_for("!$('with-start').hidden")
    job = submitted(page, idle)
    idle.finish(job)
    page.wait_for("$('gallery').children.length === 4")
    page.run("document.querySelectorAll('#gallery button')[1].click(); $('copy-image').click()")
    page.wait_for("$('command-view').open && $('copied').textContent === 'Copied.'")
    fields = job.images[1].request.typed() | {"init_image": "photo of.png"}
    assert page.run("window.copied") == command_line(parse_request(fields))
    assert "It reads photo of.png." in text_of(page, "#command-files")
    page.run("delete navigator.clipboard.writeText; navigator.clipboard.writeText = async () => { throw 0 }")
    page.run("document.oncopy = () => { window.copied = 'by selection' }; $('copy-command').click()")
    page.wait_for("window.copied === 'by selection'")


# For everybody


def test_everything_is_done_with_the_keyboard(page: Browser, idle: IdleServer) -> None:
    page.run("$('prompt').focus()")
    page.type(PROMPT)
    order = []
    for _ in range(20):
        page.press("Tab")
        order.append(page.run("document.activeElement.id"))
        assert page.run("document.activeElement.matches(':focus-visible')"), order
        assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid", order
        if order[-1] == "generate":
            break
    assert order[:5] == ["negative_prompt", "model", "width", "swap", "height"]
    assert order[-1] == "generate"
    page.press("Enter", ctrl=True)
    page.wait_for("document.querySelector('.job')")
    idle.finish(idle.jobs[-1])
    page.wait_for("$('gallery').children.length === 1")
    for _ in range(10):
        page.press("Tab")
        if page.run("document.activeElement.closest('#gallery') !== null"):
            break
    page.press("Enter")
    page.wait_for("$('viewer').open")
    page.press("Escape")
    assert page.run("[$('viewer').open, document.activeElement.closest('#gallery') !== null]") == [False, True]
    page.press("Tab", shift=True)
    assert page.run("document.activeElement !== document.body")


@pytest.mark.slow
def test_every_control_has_a_name_for_screen_readers(page: Browser, idle: IdleServer, tmp_path: Path) -> None:
    enter(page, prompt=PROMPT)
    idle.finish(submitted(page, idle))
    submitted(page, idle)
    page.choose("#start-file", picture(tmp_path / "photo.png"))
    page.run("$('more').open = true")
    page.wait_for("!$('with-start').hidden && $('gallery').children.length === 1")
    for opener in ("0", "$('draw').click()", "document.querySelector('#gallery button').click()"):
        page.run(opener)
        nodes = page._call("Accessibility.getFullAXTree")["nodes"]
        roles = {"button", "link", "textbox", "combobox", "spinbutton", "slider", "image", "progressbar", "dialog"}
        named = [
            (node["role"]["value"], node.get("name", {}).get("value"))
            for node in nodes
            if not node["ignored"] and node["role"]["value"] in roles
        ]
        assert len(named) > 5
        assert all(name for _, name in named), named
        page.press("Escape")


def test_progress_is_announced_at_a_bearable_rate(page: Browser, idle: IdleServer) -> None:
    page.run("""window.said = []; new MutationObserver(() => said.push($('live').textContent))
        .observe($('live'), {childList: true, characterData: true, subtree: true})""")
    enter(page, prompt=PROMPT, steps="40")
    job = submitted(page, idle)
    idle.begin(job)
    for step in range(1, 41):
        idle.step(job, step, 40)
    page.wait_for("document.querySelector('.status').textContent.includes('Step 40')")
    idle.finish(job)
    page.wait_for("$('gallery').children.length === 1")
    assert page.run("said") == ["Queued, place 1.", "Started.", "The image is done."]


@pytest.mark.parametrize("width", [360, *(pytest.param(width, marks=pytest.mark.slow) for width in (800, 1280))])
def test_nothing_is_wider_than_the_window(page: Browser, idle: IdleServer, tmp_path: Path, width: int) -> None:
    page.resize(width, 740, touch=width == 360)
    scrolls = "document.documentElement.scrollWidth > innerWidth"
    assert page.run(scrolls) is False
    text = f"{'w' * 300}\nSteps: 2, Seed: 5, Size: 64x64, {'x' * 60}: {'y' * 300}"
    page.choose("#read-file", picture(tmp_path / f"{'n' * 100}.png", parameters=text))
    page.choose("#start-file", tmp_path / f"{'n' * 100}.png")
    page.wait_for("!$('taken').hidden && !$('with-start').hidden")
    page.run("$('add').value = 'prompt_syntax'; $('add').dispatchEvent(new Event('change', {bubbles: true}))")
    assert page.run(scrolls) is False
    idle.finish(submitted(page, idle))
    submitted(page, idle)
    page.wait_for("$('gallery').children.length === 1")
    assert page.run(scrolls) is False
    box = "document.querySelector('dialog[open]').getBoundingClientRect()"
    inside = f"{box}.left >= 0 && {box}.right <= innerWidth + 0.5"
    for opener in ("$('draw').click()", "document.querySelector('#gallery button').click()"):
        page.run(opener)
        page.wait_for("document.querySelector('dialog[open]')")
        assert page.run(f"[{scrolls}, {inside}]") == [False, True]
        assert page.run("(one => one.scrollWidth <= one.clientWidth)(document.querySelector('dialog[open]'))")
        page.press("Escape")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast_in_light_and_dark(page: Browser, scheme: str) -> None:
    page.emulate(prefers_color_scheme=scheme)
    script = """(() => {
        const root = getComputedStyle(document.documentElement);
        return Object.fromEntries(['back', 'card', 'well', 'text', 'faint', 'accent', 'on-accent', 'bad'].map(name => {
            const probe = document.body.appendChild(document.createElement('i'));
            probe.style.color = root.getPropertyValue('--' + name);
            return [name, getComputedStyle(probe).color.match(/\\d+/g).map(Number)];
        }));
    })()"""
    colours = page.run(script)
    assert (sum(colours["back"]) > 384) == (scheme == "light")
    for text in ("text", "faint", "bad"):
        for ground in ("back", "card", "well"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["on-accent"], colours["accent"]) >= 4.5


def contrast(one: list[float], other: list[float]) -> float:
    """The contrast ratio of two sRGB colours; WCAG 2.2, relative luminance."""

    def luminance(colour: list[float]) -> float:
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.slow
def test_nothing_moves_where_motion_is_not_wanted(page: Browser) -> None:
    motion = (
        "[...document.querySelectorAll('*')].filter(one => parseFloat(getComputedStyle(one).transitionDuration) > 0)"
    )
    page.emulate(prefers_reduced_motion="reduce")
    assert page.run(f"{motion}.length") == 0
    assert page.run("getComputedStyle(document.documentElement).scrollBehavior") == "auto"


def test_the_files_of_the_page_are_small_and_without_addresses_of_others(idle: IdleServer) -> None:
    for name in ("", "page/page.css", "page/main.js", "page/jobs.js", "page/icon.svg"):
        answer = httpx.get(f"{idle.url}/{name}")
        assert answer.status_code == 200, name
        assert len(answer.content) < 40_000
        outside = [word for word in answer.text.split() if "://" in word and "www.w3.org/2000/svg" not in word]
        assert outside == []
    assert httpx.get(f"{idle.url}/page/files.py").status_code == 404
    assert httpx.get(f"{idle.url}/page/../app.py").status_code == 404
    assert json.loads(httpx.get(f"{idle.url}/openapi.json").text)["paths"].keys().isdisjoint({"/", "/page/main.js"})
