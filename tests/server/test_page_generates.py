"""The web page with a real server and the model `tiny`: to the end, cancelled while it runs, and through a reload."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Browser, browser
from tests.server.running import RunningServer
from tests.server.test_page import centre, enter, opened, picture, ready, text_of, violations

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture
def page(chromium: Browser, server: RunningServer) -> Browser:
    chromium.open(f"{server.url}/healthz")  # of the same origin, without the page, which writes as it is left
    chromium.run("localStorage.clear()")
    opened(chromium, server.url)
    chromium.run("$('model').value = 'tiny'; $('model').dispatchEvent(new Event('change', {bubbles: true}))")
    return chromium


DIGEST = """(async () => {
    const data = await (await fetch(document.querySelector('#gallery img').src)).arrayBuffer();
    const digest = await crypto.subtle.digest('SHA-256', data);
    return [...new Uint8Array(digest)].map(byte => byte.toString(16).padStart(2, '0')).join('');
})()"""


def test_an_image_is_generated_to_the_end_with_the_bytes_of_any_other_client(
    page: Browser, server: RunningServer, tmp_path: Path
) -> None:
    enter(page, prompt="a red fox", seed="7", steps="3")
    page.run("$('prompt').focus()")
    page.press("Enter", ctrl=True)
    page.wait_for("document.querySelector('#gallery img')?.naturalWidth === 64")
    page.wait_for("$('live').textContent === 'The image is done.'")
    assert text_of(page, "#gallery .seed") == "7"
    page.run("document.querySelector('#gallery button').click()")
    saved = page.run("$('large').src.startsWith('blob:') && $('download').download")
    assert saved == "a-red-fox-7.png"
    alone = server.generate(prompt="a red fox", seed=7, steps=3)
    page._call("Page.setBypassCSP", enabled=True)  # for `fetch` of the blob by this test
    page.reload()
    ready(page)
    page.wait_for("document.querySelector('#gallery img')?.naturalWidth === 64")
    assert page.run(DIGEST) == hashlib.sha256(alone).hexdigest()
    page._call("Page.setBypassCSP", enabled=False)
    assert violations(page) == []


def test_a_running_job_survives_a_reload_shows_previews_and_is_cancelled(page: Browser, server: RunningServer) -> None:
    enter(page, prompt="a red fox", steps="900", num_images="4", width="256", height="256")
    page.run("$('generate').click()")
    page.wait_for("document.querySelector('.status')?.textContent.includes('Step')")
    page.reload()
    ready(page)
    page.wait_for("document.querySelector('.job img')?.naturalWidth > 0")
    assert "left" in text_of(page, ".status")
    page.press("Escape")
    page.wait_for("!document.querySelector('.job')")
    page.wait_for("$('live').textContent === 'Cancelled.'")
    assert violations(page) == []


def test_what_a_mask_keeps_is_kept(page: Browser, server: RunningServer, tmp_path: Path) -> None:
    page.choose("#start-file", picture(tmp_path / "photo.png", (64, 64)))
    page.wait_for("!$('with-start').hidden")
    page.run("$('draw').click(); $('brush-size').value = 60")
    page.drag(centre(page, "#mask", 0.5, 0.1), centre(page, "#mask", 0.9, 0.1))
    page.press("Escape")
    enter(page, prompt="a red fox", steps="4")
    page.run("$('generate').click()")
    page.wait_for("document.querySelector('#gallery img')?.naturalWidth === 64")
    pixel = """(() => {
        const canvas = Object.assign(document.createElement('canvas'), {width: 64, height: 64});
        const context = canvas.getContext('2d');
        context.drawImage(document.querySelector('#gallery img'), 0, 0);
        return [[45, 6], [8, 60]].map(([x, y]) => [...context.getImageData(x, y, 1, 1).data.slice(0, 3)]);
    })()"""
    painted, kept = page.run(pixel)
    teal = (0, 128, 128)
    assert sum(abs(one - other) for one, other in zip(kept, teal, strict=True)) < 10
    assert sum(abs(one - other) for one, other in zip(painted, teal, strict=True)) > 60
