"""Images in every form that people have them: turned, transparent, in print colours, sixteen bits deep, broken."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps, PngImagePlugin

from sdcli.errors import BadImage, NotFound
from sdcli.images.image_files import open_image
from sdcli.images.pixels import fit, from_pixels, to_pixels


def sample_image(width: int = 24, height: int = 16, *, mode: str = "RGB") -> Image.Image:
    """A smooth image whose corners all differ, so that a turn is seen."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 255 // (width + height - 2)]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8)).convert(mode)


def saved(folder: Path, image: Image.Image, name: str, **options: Any) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


def distance(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def bomb(width: int, height: int) -> bytes:
    """A PNG that announces many pixels and holds none."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.webp"])
def test_a_lossless_image_is_read_exactly(tmp_path: Path, name: str) -> None:
    options = {"lossless": True} if name.endswith("webp") else {}
    opened = open_image(saved(tmp_path, sample_image(), name, **options))
    assert opened.mode == "RGB"
    assert distance(opened, sample_image()) == 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
def test_a_turned_photo_is_read_upright(tmp_path: Path, name: str, orientation: int) -> None:
    turns = [None, None, 0, 3, 1, 5, 2, 6, 4]  # what a camera did to the image, undone by the orientation
    turn = turns[orientation]
    stored = sample_image() if turn is None else sample_image().transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(saved(tmp_path, stored, name, exif=exif, **({"quality": 98} if name != "a.tiff" else {})))
    assert opened.size == (24, 16)
    assert distance(opened, sample_image()) < 40


def test_transparent_parts_are_white_in_every_mode(tmp_path: Path) -> None:
    clear = sample_image(mode="RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    expected = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    assert distance(open_image(saved(tmp_path, clear, "rgba.png")), expected) == 0

    grey = sample_image().convert("LA")
    grey.putalpha(0)
    assert open_image(saved(tmp_path, grey, "la.png")).getcolors() == [(24 * 16, (255, 255, 255))]

    palette = sample_image().quantize(8)
    named = palette.getpixel((0, 0))
    opened = open_image(saved(tmp_path, palette, "p.png", transparency=named))
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert distance(open_image(saved(tmp_path, palette, "solid.png")), palette.convert("RGB")) == 0

    key = sample_image()
    opened = open_image(saved(tmp_path, key, "key.png", transparency=key.getpixel((0, 0))))
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((20, 10)) == key.getpixel((20, 10))


def test_print_colours_become_screen_colours(tmp_path: Path) -> None:
    flat = Image.new("RGB", (16, 16), (200, 40, 90))
    opened = open_image(saved(tmp_path, flat.convert("CMYK"), "cmyk.jpg", quality=98))
    assert distance(opened, flat) <= 3


def test_sixteen_bits_keep_their_range(tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, 32 * 8).astype(np.uint16).reshape(8, 32)
    for name in ("deep.png", "deep.tiff"):
        opened = np.asarray(open_image(saved(tmp_path, Image.fromarray(deep), name)))
        assert opened.shape == (8, 32, 3)
        assert np.abs(opened[..., 0] - deep / 257).max() <= 0.5
    with pytest.raises(BadImage, match="floating-point"):
        open_image(saved(tmp_path, Image.fromarray(deep.astype(np.float32)), "float.tiff"))


def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
        assert distance(open_image(path), frames[0]) < 40


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.gif", "a.tiff"])
def test_a_truncated_image_is_told_in_a_sentence(tmp_path: Path, name: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = saved(tmp_path, noise, name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadImage, match=f"^{path}: "):
        open_image(path)


@pytest.mark.parametrize("size", [(40_000, 40_000), (8193, 8192), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_at_once(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(*size))
    started = time.monotonic()
    with pytest.raises(BadImage, match=r"too many to be read safely|cannot be read"):
        open_image(path)
    assert time.monotonic() - started < 1


def test_a_text_chunk_that_unpacks_to_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("comment", "x" * 70_000_000, zip=True)
    path = saved(tmp_path, sample_image(), "a.png", pnginfo=texts)
    assert path.stat().st_size < 200_000
    with pytest.raises(BadImage, match=f"^{path}: cannot be read: its text 'comment' is larger than 16 MiB"):
        open_image(path)


def test_what_is_no_image_is_refused_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    (tmp_path / "empty.png").write_bytes(b"")
    ppm = io.BytesIO()
    sample_image().save(ppm, "PPM")
    (tmp_path / "portable.png").write_bytes(ppm.getvalue())
    paths = sorted(tmp_path.glob("*.png"))
    assert len(paths) == 4
    for path in paths:
        with pytest.raises(BadImage, match="is not a PNG, JPEG, WebP, BMP, GIF or TIFF image"):
            open_image(path)
    with pytest.raises(BadImage, match="folder"):
        open_image(tmp_path)
    with pytest.raises(NotFound):
        open_image(tmp_path / "absent.png")


def test_damaged_exif_does_not_cost_the_image(tmp_path: Path) -> None:
    path = saved(tmp_path, sample_image(), "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 40)
    assert open_image(path).size == (24, 16)


def test_pixels_and_images_turn_into_each_other_as_in_diffusers() -> None:
    processor = VaeImageProcessor()
    image = sample_image()
    pixels = to_pixels(image)
    assert pixels.shape == (3, 16, 24)
    assert torch.equal(pixels * 2 - 1, processor.preprocess(image)[0])
    assert distance(from_pixels(pixels), image) == 0
    noise = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(0))
    (expected,) = processor.numpy_to_pil(processor.pt_to_numpy(noise[None]))
    assert distance(from_pixels(noise), expected) == 0


def test_without_a_size_the_middle_is_cut_out_and_nothing_is_resized() -> None:
    image = sample_image(29, 18)
    cut = fit(image, None)
    assert cut.size == (24, 16)
    assert cut.tobytes() == image.crop((2, 1, 26, 17)).tobytes()
    assert fit(sample_image(), None).tobytes() == sample_image().tobytes()
    with pytest.raises(BadImage, match="at least 8x8"):
        fit(sample_image(40, 7), None)


def test_the_three_ways_to_fit_a_size() -> None:
    wide = sample_image(64, 32)
    crop, pad, stretch = (fit(wide, (32, 32), how=how) for how in ("crop", "pad", "stretch"))
    assert crop.size == pad.size == stretch.size == (32, 32)
    assert distance(crop, wide.crop((16, 0, 48, 32))) <= 1
    assert {pad.getpixel((5, row)) for row in (0, 7, 24, 31)} == {(0, 0, 0)}
    assert distance(pad.crop((0, 8, 32, 24)), wide.resize((32, 16), Image.Resampling.LANCZOS)) == 0
    assert distance(stretch, wide.resize((32, 32), Image.Resampling.LANCZOS)) == 0
    assert distance(fit(ImageOps.mirror(wide), (32, 32)), ImageOps.mirror(crop)) <= 1
