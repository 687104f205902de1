"""Opens image files that may be hostile (allowed formats only, size limits) and turns them into upright RGB images."""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from sdcli.errors import BadImage, SdcliError
from sdcli.images.formats import MAX_PIXELS
from sdcli.images.png_chunks import without_refused_chunks
from sdcli.request.input_files import MAX_FILE_BYTES, check_readable

OWN_FORMATS = ("PNG", "JPEG", "WEBP")
"""Pillow's names of the formats that sdcli writes."""
READABLE = (*OWN_FORMATS, "BMP", "GIF", "TIFF")
"""Pillow's names of the formats that are read; Pillow's other readers have a long history of security holes."""
BITS_PER_SAMPLE = 258
"""The tag of a TIFF file."""


def open_image(path: Path) -> Image.Image:
    """An image file -> its first frame, decoded, as `upright_rgb` makes it.

    Raises NotFound, and BadImage for a file that is truncated, damaged, too large, or not an image.
    """
    check_readable(path)
    return _decoded(path, name=str(path), convert=upright_rgb)


def image_from_bytes(data: bytes, *, name: str) -> Image.Image:
    """The bytes of an image file -> the image, with the same checks as `open_image`.

    Raises BadImage, whose sentence begins with `name`.
    """
    return _from_bytes(data, name, upright_rgb)


def original_from_bytes(data: bytes, *, name: str) -> Image.Image:
    """Like `image_from_bytes`, but in the file's own mode, with its transparency."""
    return _from_bytes(data, name, _upright)


def _from_bytes(data: bytes, name: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    if len(data) > MAX_FILE_BYTES:
        raise BadImage(f"{name}: larger than {MAX_FILE_BYTES // 1024**2} MiB, the limit for an image file")
    return _decoded(io.BytesIO(data), name=name, convert=convert)


def _decoded(file: Path | io.BytesIO, *, name: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with open_safely(file, formats=READABLE) as image:
            _scale_transparent_colour(image)
            image.load()
            return convert(image)
    except BadImage as error:
        raise BadImage(f"{name}: {error}") from None


@contextlib.contextmanager
def open_safely(file: Path | io.BytesIO, *, formats: tuple[str, ...] = OWN_FORMATS) -> Iterator[Image.Image]:
    """Open an image without decoding it; every failure inside the block, also while decoding, becomes BadImage.

    The sentence lacks the file's name: the caller puts `path: ` before it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(without_refused_chunks(file), formats=formats) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                yield image
    except SdcliError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"has more than {MAX_PIXELS:,} pixels, too many to be read safely") from None
    except UnidentifiedImageError:
        raise BadImage(f"is not a {_listed(formats)} image") from None
    except Exception as error:  # Pillow's readers fail in a dozen ways on damaged files
        raise BadImage(f"cannot be read: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Why an image cannot be read; the library's own words are about its code, not about the file."""
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "image file is truncated" if "truncated" in str(error).lower() else "the file is damaged"


def upright_rgb(image: Image.Image) -> Image.Image:
    """A copy of a decoded image as RGB, rotated as its EXIF says, with transparent parts on white.

    Raises BadImage for 32-bit and floating-point numbers, whose levels of black and white no file says.
    """
    if image.mode == "I" and _bits_of(image) > 16:
        raise BadImage(
            "holds 32-bit whole numbers, whose black and white levels are unknown; save it with 8 or 16 bits"
        )
    return _rgb(_upright(image))


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height that `open_image` gives, from the file's header alone: nothing is decoded.

    Raises NotFound and BadImage. An orientation that a PNG has only after its pixels is not seen.
    """
    check_readable(path)
    try:
        with open_safely(path, formats=READABLE) as image:
            with contextlib.suppress(Exception):  # damaged EXIF; the base class's method, since that of PNG decodes
                if Image.Image.getexif(image).get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
                    return image.height, image.width
            return image.size
    except BadImage as error:
        raise BadImage(f"{path}: {error}") from None


def pixels_digest(image: Image.Image) -> str:
    """`"sha256:<64 hex>"` of the size and the raw RGB bytes, row by row; equal only for equal images."""
    digest = hashlib.sha256(f"RGB {image.width}x{image.height}\n".encode())
    digest.update(image.convert("RGB").tobytes())
    return f"sha256:{digest.hexdigest()}"


_LEVELS = {"1": 255, "L;2": 85, "L;4": 17}
"""The raw mode of a grey PNG -> what Pillow multiplies its levels with."""


def _scale_transparent_colour(image: Image.Image) -> None:
    """Bring a PNG's transparent colour to the levels of the decoded pixels, which Pillow leaves undone.

    Has no effect on a decoded image.
    """
    tiles = getattr(image, "tile", ()) if image.format == "PNG" else ()
    raw = tiles[0].args if tiles else None
    key = image.info.get("transparency")
    if isinstance(key, int) and raw in _LEVELS:
        image.info["transparency"] = min(key * _LEVELS[raw], 255)
    elif isinstance(key, tuple) and raw == "RGB;16B":
        image.info["transparency"] = tuple(level >> 8 for level in key)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF is no reason to refuse the image, and fails in a dozen ways
        return image


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB; 16 bits a channel are scaled to 8, not clipped."""
    if image.mode.startswith("I"):
        import numpy as np  # rare, and not worth its import time for every command that opens an image

        levels = np.clip(np.asarray(image).astype(np.float64), 0, 65535)
        return Image.fromarray((levels / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage("holds floating-point numbers, whose black and white levels are unknown")
    if image.has_transparency_data:
        solid = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", solid.size, "white"), solid).convert("RGB")
    return image.convert("RGB")


def _bits_of(image: Image.Image) -> int:
    """The bits of a channel of a grey TIFF file; 16 for other formats, which have no more."""
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))
    return int(bits[0] if isinstance(bits, tuple) else bits)


def _listed(formats: tuple[str, ...]) -> str:
    names = ["WebP" if name == "WEBP" else name for name in formats]
    return f"{', '.join(names[:-1])} or {names[-1]}"
