"""Masks of every mode: what is painted on transparent, what is erased, and what cannot be told apart."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from sdcli.diffusion.input_images import InputImages
from sdcli.errors import BadImage, UsageError
from sdcli.images.image_files import original_from_bytes, upright_rgb
from sdcli.images.masks import mask_levels
from sdcli.request.fields import ImageBytes

CASES = Path(__file__).parents[1] / "cases" / "generation"
SIDE = 16
MODES = (
    "1", "L", "LA", "La", "I", "I;16", "F", "P", "P transparency", "P alphas", "PA", "RGB", "RGBA", "RGBa", "CMYK",
    "L colour", "RGB colour", "1 colour", "I;16 colour",
)  # fmt: skip
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
"""An init image of many colours."""


def region(seed: int) -> np.ndarray:
    """Some pixels, neither all nor none."""
    chosen = np.random.default_rng(seed).random((SIDE, SIDE)) < 0.5
    chosen[0, 0], chosen[-1, -1] = True, False
    return chosen


def generated(mask: Image.Image, init: Image.Image = PICTURE) -> np.ndarray:
    """Where the mask has the image generated."""
    return np.asarray(mask_levels(mask, init).convert("L")) >= 128


def reread(image: Image.Image, form: str = "PNG", **options: Any) -> Image.Image:
    file = io.BytesIO()
    image.save(file, form, **options)
    return original_from_bytes(file.getvalue(), name="mask")


def with_alpha(colours: np.ndarray, alpha: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([colours, alpha]).astype(np.uint8))


def strokes(where: np.ndarray) -> Image.Image:
    """White on transparent black."""
    return with_alpha(np.repeat(255 * where[..., None], 3, axis=2), 255 * where)


def erased(picture: Image.Image, where: np.ndarray) -> Image.Image:
    return with_alpha(np.asarray(picture), 255 * ~where)


# The files of the cases


@pytest.mark.parametrize(
    ("name", "right"), [("mask_white_strokes_on_transparent.png", True), ("mask_erased_picture.png", True)]
)
def test_only_the_half_that_was_painted_or_erased_is_generated(name: str, right: bool) -> None:
    mask = original_from_bytes((CASES / name).read_bytes(), name=name)
    init = Image.open(CASES / "start.png").convert("RGB")
    alpha = np.asarray(mask)[..., 3] > 0
    assert (generated(mask, init) == (alpha if "strokes" in name else ~alpha)).all()


# One meaning in every file format and mode


@pytest.mark.parametrize(
    "encode",
    [
        pytest.param(lambda image: reread(image), id="png"),
        pytest.param(lambda image: reread(image, "WEBP", lossless=True), id="webp"),
        pytest.param(lambda image: reread(image, "WEBP", quality=60), id="lossy webp"),
        pytest.param(lambda image: reread(image, "TIFF"), id="tiff"),
        pytest.param(lambda image: reread(image, "GIF"), id="gif"),
        pytest.param(lambda image: reread(image.convert("LA")), id="grey with alpha"),
        pytest.param(lambda image: image.convert("LA").convert("La"), id="premultiplied"),
        pytest.param(lambda image: image.convert("PA"), id="palette with alpha"),
        pytest.param(lambda image: reread(image.quantize(64)), id="palette with transparency"),
    ],
)
@pytest.mark.parametrize("picture", [False, True])
def test_strokes_and_erased_pictures_are_told_apart_in_every_encoding(encode: Any, picture: bool) -> None:
    where = np.zeros((64, 64), bool)
    where[10:50, 20:40] = True
    smooth = PICTURE.resize((4, 4)).resize((64, 64), Image.Resampling.BICUBIC)
    mask = encode(erased(smooth, where) if picture else strokes(where))
    assert (generated(mask, smooth) == where).all()


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "RGB"])
def test_a_transparent_colour_is_transparent(mode: str) -> None:
    where = region(3)
    levels = np.where(where, 65535 if mode == "I;16" else 255, 0)
    if mode == "RGB":
        mask, key = Image.fromarray(np.dstack([levels] * 3).astype(np.uint8)), (0, 0, 0)
    elif mode == "I;16":
        mask, key = Image.fromarray(levels.astype(np.uint16)), 0
    else:
        mask, key = Image.fromarray(levels.astype(np.uint8)).convert(mode), 0
    assert (generated(reread(mask, transparency=key)) == where).all()
    with pytest.raises(UsageError, match="neither white strokes"):  # the black pixels alone are left
        generated(reread(mask, transparency=(255, 255, 255) if mode == "RGB" else int(levels.max())))


def png(width: int, depth: int, kind: int, rows: bytes, key: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"tRNS", key), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


@pytest.mark.parametrize(
    ("depth", "kind", "row", "key"),
    [
        (1, 0, [0b10100000], [0]),
        (2, 0, [0b11001100], [0]),
        (4, 0, [0xF0, 0xF0], [0]),
        (8, 0, [255, 0, 255, 0], [0]),
        (16, 0, [255, 255, 0, 9, 255, 255, 0, 9], [9]),
        (8, 2, [255] * 3 + [1, 2, 3] + [255] * 3 + [1, 2, 3], [1, 2, 3]),
        (16, 2, [255] * 6 + [1, 9] * 3 + [255] * 6 + [1, 9] * 3, [0x0109] * 3),
    ],
)
def test_the_transparent_colour_of_a_png_counts_in_every_depth(
    depth: int, kind: int, row: list[int], key: list[int]
) -> None:
    """Pillow compares it with levels that it has scaled."""
    data = png(4, depth, kind, bytes([0, *row]), struct.pack(f">{len(key)}H", *key))
    init = Image.new("RGB", (4, 1), "blue")
    assert generated(original_from_bytes(data, name="mask"), init).tolist() == [[True, False, True, False]]
    inverted = {1: 1, 2: 3, 4: 15}.get(depth)
    if inverted is not None:
        data = png(4, depth, kind, bytes([0, *row]), struct.pack(">H", inverted))
        with pytest.raises(UsageError, match="neither white strokes"):
            generated(original_from_bytes(data, name="mask"), init)


# Edges, and alpha that says nothing


def test_alpha_that_is_the_same_everywhere_says_nothing() -> None:
    where = region(1)
    levels = np.repeat(np.where(where, 200, 100)[..., None], 3, axis=2)
    for alpha in (1, 128, 254, 255):
        assert (generated(with_alpha(levels, np.full((SIDE, SIDE), alpha))) == where).all()
    nearly = np.where(where, 255, 252)
    assert (generated(with_alpha(levels, nearly)) == where).all()
    with pytest.raises(UsageError, match="is transparent all over"):
        generated(with_alpha(levels, np.zeros((SIDE, SIDE))))


def test_an_edge_is_cut_where_it_is_half_transparent() -> None:
    ramp = np.tile(np.linspace(0, 255, SIDE).round(), (SIDE, 1))
    white = np.full((SIDE, SIDE, 3), 255)
    half = np.tile(np.arange(SIDE) >= SIDE // 2, (SIDE, 1))
    assert (generated(with_alpha(white, ramp)) == half).all()
    assert (generated(with_alpha(white * (ramp[..., None] / 255), ramp)) == half).all()  # colours premultiplied
    assert (generated(with_alpha(white, ramp * 0.4)) == half).all()  # a brush of 40 %
    assert (generated(with_alpha(np.asarray(PICTURE), ramp)) == ~half).all()


def test_what_an_erased_picture_shows_means_nothing() -> None:
    where = region(2)
    bright = Image.fromarray((np.asarray(PICTURE) // 4 + 190).astype(np.uint8))
    grey = PICTURE.convert("L").convert("RGB")
    flat = Image.fromarray(np.where(region(5)[..., None], [0, 0, 0], [255, 255, 255]).astype(np.uint8))
    for picture, init in ((bright, bright), (bright, PICTURE), (grey, PICTURE), (flat, flat), (PICTURE, flat)):
        assert (generated(erased(picture, where), init) == where).all()


@pytest.mark.parametrize("colour", ["black", "red", "yellow", (200, 200, 200)])
def test_strokes_of_another_colour_than_white_are_refused(colour: Any) -> None:
    plain = np.asarray(Image.new("RGB", (SIDE, SIDE), colour))
    with pytest.raises(UsageError, match="is neither white strokes on transparent nor the init image"):
        generated(with_alpha(plain, 255 * region(1)))


def test_masks_with_two_meanings_are_refused() -> None:
    two = np.where(region(7)[..., None], 255, 0) * np.ones(3)
    with pytest.raises(UsageError, match="is neither white strokes on transparent nor the init image"):
        generated(with_alpha(two, 255 * region(1)))  # black and white on transparent
    with pytest.raises(UsageError, match="may be strokes to generate or what is left"):
        generated(strokes(region(1)), Image.new("RGB", (SIDE, SIDE), "white"))
    with pytest.raises(UsageError, match="no part that is more transparent"):
        generated(with_alpha(np.asarray(PICTURE), np.where(region(1), 255, 160)))
    with pytest.raises(BadImage, match="floating-point"):
        generated(Image.new("F", (SIDE, SIDE)))


# The files as a request names them


def data_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def init_image(mask: Image.Image, init: Image.Image = PICTURE, **more: Any) -> Any:
    fields = {
        "init_image": ImageBytes.model_validate(data_of(init)),
        "mask": ImageBytes.model_validate(data_of(mask)), "extend": None,
        "invert_mask": False, "mask_blur": 0, "width": init.width, "height": init.height, **more,
    }  # fmt: skip
    return InputImages().init_image(SimpleNamespace(**fields))  # type: ignore[arg-type]


def test_a_mask_that_is_the_same_everywhere_is_told() -> None:
    white, black = (Image.new("L", PICTURE.size, level) for level in (255, 0))
    (note,) = init_image(white).notes
    assert note == "the mask selects all of the init image, so nothing of it is kept"
    assert init_image(black, invert_mask=True).notes == (note,)
    assert init_image(Image.fromarray(255 * region(1).astype(np.uint8))).notes == ()
    for mask, inverted in ((black, False), (white, True)):
        with pytest.raises(UsageError, match="all over, so nothing would be generated"):
            init_image(mask, invert_mask=inverted)


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(UsageError, match="the mask is 8x8 pixels, the init image 16x16; make them equal"):
        init_image(Image.new("L", (8, 8), 255))


def test_a_refusal_names_the_mask() -> None:
    with pytest.raises(UsageError, match=r"^the mask .* has transparent parts, but is neither .*; save it without"):
        init_image(with_alpha(np.zeros((SIDE, SIDE, 3)), 255 * region(1)))


# Any mask


def of_mode(mode: str, pixels: np.ndarray, key: int) -> Image.Image:
    """A mask of one of MODES from levels [H, W, 4]."""
    colour, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    match mode.split():
        case ["P", "transparency"]:
            image = colour.convert("RGB").quantize(8)
            image.info["transparency"] = key % 8
        case ["P", "alphas"]:
            image = colour.convert("RGB").quantize(8)
            image.info["transparency"] = bytes(pixels[0, :8, 3])
        case ["I;16", *more]:
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
            image.info |= {"transparency": int(pixels[0, 0, 0]) * 257} if more else {}
        case ["I" | "F"]:
            image = grey.convert(mode)
        case ["1" | "L" as plain, "colour"]:
            image = grey.convert(plain)
            image.info["transparency"] = image.getpixel((0, 0))
        case ["RGB", "colour"]:
            image = colour.convert("RGB")
            image.info["transparency"] = image.getpixel((0, 0))
        case ["CMYK" | "1" | "L" | "P" | "RGB"]:
            image = colour.convert("RGB").convert(mode)
        case ["La"]:
            image = colour.convert("LA").convert("La")
        case ["RGBa"]:
            image = colour.convert("RGBa").convert("RGBA")  # Pillow opens no file as RGBa
        case _:
            image = colour.convert(mode)
    return image


@st.composite
def masks(draw: st.DrawFn) -> tuple[str, Image.Image]:
    """A mode and a mask: any pixels, few colours, white or a picture; any alpha, hard alpha or none."""
    source = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    colours = draw(st.sampled_from(["any", "white", "two", "black", "picture", "red"]))
    alphas = draw(st.sampled_from(["any", "hard", "opaque", "clear", "soft", "flat"]))
    shape = (SIDE, SIDE)
    rgb = {
        "any": lambda: source.integers(0, 256, (*shape, 3)),
        "white": lambda: np.full((*shape, 3), 255),
        "two": lambda: np.repeat(source.integers(0, 2, (*shape, 1)) * 255, 3, axis=2),
        "black": lambda: np.zeros((*shape, 3)),
        "picture": lambda: np.asarray(PICTURE),
        "red": lambda: np.full((*shape, 3), (255, 0, 0)),
    }[colours]()
    alpha = {
        "any": lambda: source.integers(0, 256, shape),
        "hard": lambda: source.integers(0, 2, shape) * 255,
        "opaque": lambda: np.full(shape, 255),
        "clear": lambda: np.zeros(shape),
        "soft": lambda: np.tile(np.linspace(0, 255, SIDE), (SIDE, 1)),
        "flat": lambda: np.full(shape, source.integers(0, 256)),
    }[alphas]()
    mode = draw(st.sampled_from(MODES))
    return mode, of_mode(mode, np.dstack([rgb, alpha]).astype(np.uint8), draw(st.integers(0, 7)))


def outcome(mask: Image.Image) -> bytes | str:
    try:
        return generated(mask).tobytes()
    except (UsageError, BadImage) as error:
        return str(error)


def any_mode_is_read_like_rgba(given: tuple[str, Image.Image]) -> None:
    mode, mask = given
    read = outcome(mask)
    if mode in ("I", "I;16", "CMYK"):
        assert read == outcome(upright_rgb(mask))
    elif mode == "La":
        assert read == outcome(mask.convert("LA").convert("RGBA"))
    elif mode == "I;16 colour":
        clear = np.asarray(mask) == mask.info["transparency"]
        assert read == outcome(with_alpha(np.asarray(upright_rgb(mask)), 255 * ~clear))
    elif mode != "F":
        assert read == outcome(mask.convert("RGBA"))
    else:
        assert read == "holds floating-point numbers, whose black and white levels are unknown"


@given(masks())
@settings(max_examples=100)
def test_a_mask_of_any_mode_is_read_like_its_rgba_conversion(given: tuple[str, Image.Image]) -> None:
    any_mode_is_read_like_rgba(given)


@pytest.mark.slow
@given(masks())
@settings(max_examples=1500, suppress_health_check=list(HealthCheck))
def test_many_masks_are_read_like_their_rgba_conversion(given: tuple[str, Image.Image]) -> None:
    any_mode_is_read_like_rgba(given)


def meaning_survives(seed: int, picture: bool, mode: str) -> None:
    where = region(seed)
    drawn = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    image = Image.fromarray(drawn)
    mask = erased(image, where) if picture else strokes(where)
    if mode == "P alphas":
        mask = mask.quantize(256)
    elif mode == "RGB colour":
        colours = np.asarray(mask)[..., :3].copy()
        colours[np.asarray(mask)[..., 3] == 0] = (7, 1, 3)
        assume((np.asarray(image) != (7, 1, 3)).any(axis=2).all())
        mask = Image.fromarray(colours)
        mask.info["transparency"] = (7, 1, 3)
    else:
        mask = mask.convert(mode)
    assert (generated(mask, image) == where).all()


MEANINGS = {
    "seed": st.integers(0, 2**32 - 1),
    "picture": st.booleans(),
    "mode": st.sampled_from(["RGBA", "LA", "PA", "P alphas", "RGB colour"]),
}


@given(**MEANINGS)
@example(seed=0, picture=True, mode="LA")
@settings(max_examples=60)
def test_what_was_painted_or_erased_is_generated_in_every_mode(seed: int, picture: bool, mode: str) -> None:
    meaning_survives(seed, picture, mode)


@pytest.mark.slow
@given(**MEANINGS)
@settings(max_examples=1000, suppress_health_check=list(HealthCheck))
def test_what_was_painted_or_erased_is_generated_in_many_masks(seed: int, picture: bool, mode: str) -> None:
    meaning_survives(seed, picture, mode)
