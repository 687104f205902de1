"""`generate --preview` and `--show`: quick looks that are right, seldom, and change no image."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from rich.console import Console
from torch import Tensor

from sdcli.cli.ui.preview import SHARE, Preview, Throttle
from sdcli.cli.ui.terminal_images import BELOW, HalfBlocks
from sdcli.diffusion.preview_decoder import PreviewDecoder
from sdcli.errors import CannotWrite, SdcliError, UsageError
from sdcli.generation.events import Progress
from sdcli.images.contact_sheet import KEY
from sdcli.io.files import AlreadyExists
from sdcli.models.families import FAMILIES
from sdcli.models.families.family import latents_or_pixels
from sdcli.models.hub.cache import ref_file, snapshot_folder
from sdcli.models.loaded_model import LoadedModel
from sdcli.models.loader import load_model
from sdcli.models.preview_vae import preview_source
from sdcli.models.registry import load_registry
from sdcli.vae.latent_preview import FEW_CELLS, latent_preview
from sdcli.vae.latent_space import PixelSpace
from tests.conftest import REPOSITORY
from tests.generation.test_encode_decode import (
    _here,  # noqa: F401
    draw,
    good,
    run,
)


class Linear:
    """A space whose decoder colours each cell by a linear function of it."""

    def __init__(self) -> None:
        self.weights = torch.randn((3, 4), generator=torch.Generator().manual_seed(0)) / 20
        self.decoded: list[Tensor] = []

    def colours(self, x: Tensor) -> Tensor:
        return torch.einsum("kc,chw->khw", self.weights, x) + 0.5

    def decode(self, x: Tensor, *, tiled: bool = False) -> Tensor:
        self.decoded.append(x)
        return torch.stack([self.colours(one) for one in x]).repeat_interleave(8, 2).repeat_interleave(8, 3)


def test_few_latents_are_decoded_as_they_are() -> None:
    space = latents_or_pixels(load_model(load_registry().find("tiny"), device="cpu", dtype="float32"))
    x = torch.randn((4, 8, 6), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(latent_preview(space, x), space.decode(x[None])[0])
    pixels = torch.rand((1, 40, 40), generator=torch.Generator().manual_seed(1)) * 2 - 1
    torch.testing.assert_close(latent_preview(PixelSpace(1), pixels), PixelSpace(1).decode(pixels[None])[0])


@pytest.mark.parametrize("size", [(64, 64), (17, 90), (300, 2)])
def test_the_colours_of_many_latents_are_those_of_a_linear_decoder(size: tuple[int, int]) -> None:
    space: Any = Linear()
    x = torch.randn((4, *size), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(latent_preview(space, x), space.colours(x).clamp(0, 1), rtol=1e-3, atol=1e-3)
    (decoded,) = space.decoded
    assert decoded.shape[2] * decoded.shape[3] <= FEW_CELLS


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_latents_that_are_all_the_same_have_a_look_too(value: float) -> None:
    space: Any = Linear()
    seen = latent_preview(space, torch.full((4, 40, 40), value))
    assert seen.isfinite().all()
    assert 0 <= float(seen.min()) <= float(seen.max()) <= 1


def test_previews_take_their_share_of_the_time_and_no_more() -> None:
    now, spent, count = 0.0, 0.0, 0
    throttle = Throttle(lambda: now)
    for step in range(400):
        now += 0.1
        if throttle.due():
            cost = 0.02 if step % 3 else 0.2
            with throttle.spending():
                now += cost
            spent, count = spent + cost, count + 1
        assert spent <= SHARE * now + 0.2
    assert count > 5


def test_a_short_run_is_shown_once_at_its_end_and_what_cannot_be_seen_is_not() -> None:
    shown: list[Any] = []
    ticks = itertools.count()
    preview = Preview(shown.append, Throttle(lambda: next(ticks) / 1000), warn=shown.append)
    for last in (None, "first", "second"):
        for index in range(3):
            preview.step(Progress((1,), index, 3, lambda last=last: last))  # type: ignore[misc]
    assert shown == ["first"]


def test_a_preview_that_cannot_be_written_is_told_once_and_ends_nothing() -> None:
    def full(_: Any) -> None:
        raise CannotWrite("the disk is full")

    told: list[str] = []
    preview = Preview(full, warn=told.append)
    for index in range(3):
        preview.step(Progress((1,), index, 1, lambda: "a guess"))  # type: ignore[arg-type, return-value]
    assert told == ["no further previews: the disk is full"]


def test_half_blocks_are_the_image() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (13, 20, 3), dtype=np.uint8))
    console = Console(width=20, height=BELOW + 7, color_system="truecolor", force_terminal=True)
    lines = [line for line in console.render_lines(HalfBlocks(image), pad=False) if line]
    seen = np.zeros((14, 20, 3), np.uint8)
    for row, line in enumerate(lines):
        cells = [segment.style for segment in line for _ in segment.text]
        for column, style in enumerate(cells):
            assert style is not None
            assert style.color is not None
            seen[2 * row, column] = style.color.get_truecolor()
            if style.bgcolor is not None:
                seen[2 * row + 1, column] = style.bgcolor.get_truecolor()
    np.testing.assert_array_equal(seen[:13], np.asarray(image))


# The tiny autoencoder


def save_tiny_vae(**changes: Any) -> AutoencoderTiny:
    """A miniature of madebyollin/taesd in the hub's cache, as other tools leave it there."""
    torch.manual_seed(0)
    config = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4, **changes}
    vae = AutoencoderTiny(**config, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4)
    source = preview_source(FAMILIES["sd1"])
    ref_file(source).parent.mkdir(parents=True)
    ref_file(source).write_text("c" * 40)
    vae.save_pretrained(snapshot_folder(source))
    return vae


@pytest.fixture(scope="module")
def sd1(tiny_folder: Path) -> LoadedModel:
    return load_model(load_registry().find(str(tiny_folder)), device="cpu", dtype="float32")


X = torch.randn((4, 24, 32), generator=torch.Generator().manual_seed(1))


def test_many_latents_are_decoded_by_the_tiny_autoencoder_where_the_cache_has_it(sd1: LoadedModel) -> None:
    space, vae = latents_or_pixels(sd1), save_tiny_vae()
    decoder = PreviewDecoder()
    seen = decoder.pixels(sd1, space, X)
    assert decoder.described == "decoded by madebyollin/taesd"
    assert seen.shape == (3, 192, 256)
    with torch.no_grad():
        expected = vae.decode(X[None]).sample[0] / 2 + 0.5
    torch.testing.assert_close(seen, expected.clamp(0, 1))
    few = X[:, :8, :8]
    assert torch.equal(decoder.pixels(sd1, space, few), space.decode(few[None])[0])
    assert decoder.described == "decoded as the image will be"


@pytest.mark.parametrize("case", ["absent", "half", "damaged", "another class", "other latents"])
def test_otherwise_the_preview_is_the_linear_one(sd1: LoadedModel, case: str) -> None:
    model = sd1
    if case != "absent":
        save_tiny_vae()
        folder = snapshot_folder(preview_source(FAMILIES["sd1"]))
        weights, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
        if case == "half":
            weights.unlink()
        if case == "damaged":
            weights.write_bytes(weights.read_bytes()[:-9])
        if case == "another class":
            config.write_text(config.read_text().replace("AutoencoderTiny", "AutoencoderKL"))
        if case == "other latents":  # a VAE of one's own, with another scale
            own = AutoencoderKL.from_config({**sd1.vae.config, "scaling_factor": 0.9})
            model = replace(sd1, parts={**sd1.parts, "vae": own})
    space, decoder = latents_or_pixels(model), PreviewDecoder()
    torch.testing.assert_close(decoder.pixels(model, space, X), latent_preview(space, X), rtol=1e-3, atol=1e-3)
    assert decoder.described.startswith("approximated linearly")
    assert ("(" in decoder.described) == (case in ("damaged", "another class"))


def test_with_v_the_run_says_how_previews_are_decoded(tiny_folder: Path) -> None:
    job = ["generate", "a cat", "-m", str(tiny_folder), "--seed", "3", "--steps", "2", "--size", "256x192", "-o"]
    plain = run(*job, "a.png", "--preview", "live.png", "-v")
    assert "previews are approximated linearly, a pixel for each latent cell" in plain.err
    save_tiny_vae()
    tiny = run(*job, "b.png", "--preview", "live.png", "-v")
    assert "previews are decoded by madebyollin/taesd" in tiny.err
    assert "previews are" not in run(*job, "c.png", "--preview", "live.png").err
    assert Image.open("live.png").size == (256, 192)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes() == Path("c.png").read_bytes()


JOB = ["generate", "a cat", "-m", "tiny", "--seed", "3", "--steps", "2"]


@pytest.mark.slow
def test_an_image_is_the_same_with_a_preview_that_is_replaced() -> None:
    good(*JOB, "-n", "2", "-o", "plain/{index}.png")
    for folder in ("first", "second"):
        assert good(*JOB, "-n", "2", "-o", f"{folder}/{{index}}.png", "--preview", "live.png") == [
            f"{folder}/1.png",
            f"{folder}/2.png",
        ]
        for name in ("1.png", "2.png"):
            assert Path(folder, name).read_bytes() == Path("plain", name).read_bytes()
    with Image.open("live.png") as live:
        assert json.loads(live.info[KEY]) == {"preview": True}
        assert live.width > 2 * 64


def test_a_file_that_is_no_preview_is_kept() -> None:
    for content in (draw(Path("mine.png")).read_bytes(), b"", b"\x89PNG\r\n\x1a\nbroken"):
        Path("mine.png").write_bytes(content)
        assert isinstance(run(*JOB, "-o", "a.png", "--preview", "mine.png").error, AlreadyExists)
        assert Path("mine.png").read_bytes() == content
    assert not Path("a.png").exists()
    good(*JOB, "-o", "a.png", "--preview", "mine.png", "--overwrite")
    assert Image.open("mine.png").info[KEY]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--preview", "live.jpg"], UsageError),
        (["--preview", "terminal"], UsageError),
        (["--preview", "terminal", "-q"], UsageError),
        (["--show"], UsageError),
        (["--preview", "live.png", "--dry-run"], UsageError),
        (["--preview", "a.png", "-o", "a.png"], UsageError),
        (["--preview", "a.trace.png", "-o", "a.png", "--trace", "1"], UsageError),
        (["--preview", "file/live.png"], SdcliError),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_preview_that_cannot_be_is_refused(arguments: list[str], error: type[SdcliError], tmp_path: Path) -> None:
    Path("file").touch()
    assert isinstance(run(*JOB, *arguments).error, error)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.slow
def test_a_terminal_shows_the_image_and_stdout_only_its_path(tmp_path: Path) -> None:
    import pty

    master, slave = pty.openpty()
    seen = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # the end of a terminal
            while data := os.read(master, 65536):
                seen.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "TERM": "xterm-256color",
        "COLUMNS": "60",
        "LINES": "20",
    }
    environment.pop("NO_COLOR", None)
    done = subprocess.run(
        [sys.executable, "-m", "sdcli", *JOB, "-o", "a.png", "--preview", "terminal", "--show"],
        cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=slave, timeout=240,
    )  # fmt: skip
    os.close(slave)
    reader.join(20)
    os.close(master)
    assert (done.returncode, done.stdout) == (0, b"a.png\n")
    assert seen.decode(errors="replace").count("▀") >= 2 * 28 * 14
    assert (tmp_path / "a.png").is_file()
