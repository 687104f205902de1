"""An invisible text in an image's colours that survives light editing, to mark generated images.

The scheme is `dwtDct` of the library invisible-watermark, which Stable Diffusion's own scripts use: its decoder reads
the bits. In every 4x4 block of the chroma U at half size, the largest value is moved to a quarter (bit 0) or three
quarters (bit 1) of its interval of 36. A checksum follows the text, so that a reader needs not know its length.
"""

from __future__ import annotations

import binascii
from itertools import product

import numpy as np
from PIL import Image

from sdcli.errors import BadOutput
from sdcli.request.schema import MAX_WATERMARK_BYTES, watermark_room

SCALE = 36
BLOCK = 4
"""Half-size pixels per side."""
FEWEST_REPEATS = 3
_TO_U = np.array([-0.299, -0.587, 0.886]) * 0.492
"""RGB -> U without its offset of 128; ITU-R BT.601."""
_WAYS = np.array([[0.0, -0.395, 2.032], [-2.294, -2.294, 0.0]])
"""The change in RGB that raises U by 1: with Y and V unchanged, or, if blue is saturated, by less red and green."""


def with_watermark(image: Image.Image, text: str) -> Image.Image:
    """The image (RGB) with a text in it. Raises BadOutput if the text could not be read back."""
    bits = _bits(text)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    blocks = _blocks(pixels)
    if len(text.encode()) > watermark_room(*image.size):
        size = f"{image.width}x{image.height}"
        raise BadOutput(f"{size} pixels are too few for a watermark of {len(text.encode())} bytes")
    wanted = np.resize(bits, len(blocks))
    place = np.abs(blocks[:, 1:]).argmax(axis=1) + 1
    rows = np.arange(len(blocks))
    value = blocks[rows, place]
    # the interval of the value, or a neighbour: where a colour is saturated, it can change in one direction only
    centres = (np.abs(value)[:, None] // SCALE + [0, -1, 1] + 0.25 + 0.5 * wanted[:, None]) * SCALE
    best, error = pixels, np.full(len(blocks), np.inf)
    for target, way in product(centres.T, _WAYS):
        change = np.zeros_like(blocks)
        change[rows, place] = np.sign(value) * target - value
        tried = (pixels + _spread(change, pixels.shape) * way).round().clip(0, 255)
        read = _read_bits(tried)
        cost = np.abs(change).max(axis=1) * np.abs(way).max() + np.where(read == wanted, 0, 10_000)
        better = cost < error
        error = np.where(better, cost, error)
        keep = _spread(np.repeat(better[:, None], BLOCK * BLOCK, axis=1).astype(float), pixels.shape) > 0
        best = np.where(keep, tried, best)
    result = Image.fromarray(best.astype(np.uint8))
    if watermark_of(result) != text:
        raise BadOutput("the image cannot carry a watermark: its colours are too saturated; nothing was saved")
    return result


def watermark_of(image: Image.Image) -> str | None:
    """The text that `with_watermark` put into an image of the same size; None if there is none."""
    read = _read_bits(np.asarray(image.convert("RGB"), dtype=np.float64))
    for size in range(3, MAX_WATERMARK_BYTES + 3):
        count = size * 8
        if len(read) < FEWEST_REPEATS * count:
            return None
        votes = read[: len(read) // count * count].reshape(-1, count).mean(axis=0)
        data = np.packbits(votes > 0.5).tobytes()
        if data[-2:] == _checksum(data[:-2]):
            try:
                text = data[:-2].decode()
            except UnicodeDecodeError:
                continue
            if text.isprintable():
                return text
    return None


def _bits(text: str) -> np.ndarray:
    data = text.encode()
    return np.unpackbits(np.frombuffer(data + _checksum(data), dtype=np.uint8))


def _checksum(data: bytes) -> bytes:
    return binascii.crc_hqx(data, 0xFFFF).to_bytes(2, "big")


def _blocks(pixels: np.ndarray) -> np.ndarray:
    """RGB [H, W, 3] -> U at half size (Haar's low-pass: the sum of 2x2, halved) by blocks [N, 16]."""
    height, width = (side // (2 * BLOCK) * 2 * BLOCK for side in pixels.shape[:2])
    chroma = pixels[:height, :width] @ _TO_U + 128
    low = chroma.reshape(height // 2, 2, width // 2, 2).sum(axis=(1, 3)) / 2
    split = low.reshape(height // 2 // BLOCK, BLOCK, width // 2 // BLOCK, BLOCK)
    return split.transpose(0, 2, 1, 3).reshape(-1, BLOCK * BLOCK)


def _spread(change: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Changes by blocks [N, 16] -> the change of U at full size, [H, W, 1]."""
    down, across = shape[0] // (2 * BLOCK), shape[1] // (2 * BLOCK)
    low = change.reshape(down, across, BLOCK, BLOCK).transpose(0, 2, 1, 3).reshape(down * BLOCK, across * BLOCK)
    full = np.zeros((*shape[:2], 1))
    full[: low.shape[0] * 2, : low.shape[1] * 2, 0] = low.repeat(2, axis=0).repeat(2, axis=1) / 2
    return full


def _read_bits(pixels: np.ndarray) -> np.ndarray:
    blocks = _blocks(pixels)
    place = np.abs(blocks[:, 1:]).argmax(axis=1) + 1
    return (np.abs(blocks[np.arange(len(blocks)), place]) % SCALE > SCALE / 2).astype(np.int64)
