"""Opens image files that may be hostile: allowed formats only, bombs refused, every failure one sentence."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from sdcli.errors import BadImage, SdcliError
from sdcli.images.formats import MAX_PIXELS

OWN_FORMATS = ("PNG", "JPEG", "WEBP")
"""Pillow's names of the formats that sdcli writes."""


@contextlib.contextmanager
def opened(file: Path | io.BytesIO, *, formats: tuple[str, ...] = OWN_FORMATS) -> Iterator[Image.Image]:
    """An image, not yet decoded; whatever goes wrong in the block, on a hostile file too, is a BadPicture.

    Its sentence lacks the file's name: the caller puts `path: ` before it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=formats) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                yield image
    except SdcliError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"has more than {MAX_PIXELS:,} pixels, too many to be read safely") from None
    except UnidentifiedImageError:
        raise BadImage(f"is no {_listed(formats)} image") from None
    except Exception as error:  # Pillow's readers fail in a dozen ways on damaged files
        raise BadImage(f"cannot be read: {str(error) or type(error).__name__}") from None


def _listed(formats: tuple[str, ...]) -> str:
    names = ["WebP" if name == "WEBP" else name for name in formats]
    return f"{', '.join(names[:-1])} or {names[-1]}"
