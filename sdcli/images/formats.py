"""The image file formats that sdcli writes: names, suffixes and size limits. Imports neither torch nor Pillow."""

from __future__ import annotations

from typing import Literal

ImageFormat = Literal["png", "jpeg", "webp"]
Fit = Literal["crop", "pad", "stretch"]
"""How an image of another aspect ratio is brought to a size."""

MAX_PIXELS = 8192 * 8192
"""Of the largest image that is generated or read."""
MAX_SIDE: dict[ImageFormat, int] = {"png": 2**31 - 1, "jpeg": 65500, "webp": 16383}
"""Pixels a side that the formats, and the libraries that write them, can hold."""
SUFFIX_OF: dict[ImageFormat, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
"""The suffix of new files."""
FORMAT_OF: dict[str, ImageFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
"""Every suffix, in lower case -> its format."""
IMAGE_SUFFIXES = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"}
)
"""The suffixes, in lower case, of the files that are read as images where a folder is read: those that Pillow gives to
the formats in `image_files.READABLE`."""
_UNREAD = """
    .avif .avifs .heic .heif .hif .jxl .jp2 .j2k .j2c .jpc .jpf .jpx .ppm .pgm .pbm .pnm .pfm .pam .qoi .tga .ico .icns
    .cur .dds .exr .hdr .pcx .dcx .sgi .rgb .rgba .bw .ras .xbm .xpm .im .msp .psd .psb .xcf .kra .clip .ora .svg .svgz
    .eps .ps .ai .wmf .emf .fits .fit .dcm .raw .dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .raf .orf .rw2 .pef .x3f
    .3fr .mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv
"""
UNREAD_SUFFIXES = frozenset(_UNREAD.split())
"""The suffixes of images and videos that are not read: in a folder they are reported, never passed over."""
