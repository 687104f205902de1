"""Take the pictures of the server's page that docs/serve.md shows: a real server, the starter, and Chromium.

    PYTHONPATH=. python scripts/make_page_pictures.py [FOLDER]

FOLDER is docs/serve by default. Needs Chromium and the packages of the `dev` extra. Four prompts are generated, two
images each with seeds 7 and 8, none selected; then the page shows a job that runs, an image with its settings, and
the same on a phone.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.browser import Browser, browser
from tests.server.running import running_server
from tests.server.test_page import enter, opened

DOCS = Path(__file__).resolve().parent.parent / "docs"
PROMPTS = ("a fox", "a blue fish", "a hot air balloon", "a strawberry")
"""The newest comes first in the gallery."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=DOCS / "serve")
    folder = parser.parse_args().folder
    folder.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as home,
        running_server(Path(home), "--model", "starter") as server,
        browser(Path(home) / "chromium") as page,
    ):
        page.resize(1280, 900)
        page.emulate(prefers_color_scheme="light")
        opened(page, server.url)
        for number, prompt in enumerate(PROMPTS, 1):
            generate(page, prompt, seed="7", steps="", num_images="2")
            wait(
                page,
                f"document.querySelectorAll('#gallery img').length === {2 * number} && !document.querySelector('.job')",
            )
        generate(page, "a sailing boat on the sea", seed="3", steps="60", num_images="2")
        wait(page, "document.querySelector('.job img')?.naturalWidth > 0")
        page.screenshot(folder / "page-light.png")
        page.press("Escape")
        wait(page, "!document.querySelector('.job')")
        page.emulate(prefers_color_scheme="dark")
        page.run("document.querySelectorAll('#gallery button')[3].click()")
        wait(page, "$('large').naturalWidth > 0")
        page.screenshot(folder / "page-dark.png")
        page.emulate(prefers_color_scheme="light")
        page.resize(360, 740, touch=True)
        page.screenshot(folder / "page-phone.png")


def generate(page: Browser, prompt: str, **settings: str) -> None:
    """Fill in the form and start a job."""
    enter(page, prompt=prompt, **settings)
    page.run("$('generate').click()")


def wait(page: Browser, condition: str) -> None:
    """As `Browser.wait_for`, five minutes long: a busy machine generates slowly."""
    for _ in range(15):
        try:
            return page.wait_for(condition)
        except AssertionError:
            continue
    raise TimeoutError(condition)


if __name__ == "__main__":
    main()
