"""Names the files of a folder that nothing read: captions without an image, unknown tables, images without a suffix."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from sdcli.data.folder_listing import CAPTION_LIKE, Listing, base_of, stem_of
from sdcli.data.tables import TABLE_NAMES
from sdcli.images.formats import IMAGE_SUFFIXES

TABLE_LIKE = frozenset(
    {".jsonl", ".ndjson", ".csv", ".tsv", ".xlsx", ".xls", ".parquet", ".arrow", ".feather", ".json"}
)
ARCHIVES = frozenset({".zip", ".7z", ".rar", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst"})
ABOUT = frozenset({"readme", "license", "licence", "copying", "notice", "changelog", "requirements", "credits"})
"""Names, without their suffix, of texts about a data set: they are no captions."""
_IMAGE_STARTS = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_SAYS_NOTHING = frozenset({"", ".bin", ".dat", ".tmp", ".part", ".download", ".crdownload", ".orig", ".bak", ".image"})


def name_unread(
    listing: Listing,
    *,
    root: Path,
    unread: Iterable[str],
    images: Iterable[str],
    extension: str,
    table: str | None = None,
    without_captions: bool = False,
) -> None:
    """Drop or remark every file of `unread`: relative paths that nothing read.

    `images` are the images (or latents) of the folder, `extension` is that of caption files, `table` one that was read,
    and `without_captions` says that some image has no caption. What people seem to lose is marked as a loss.
    """
    owners = {stem_of(name) for name in images}
    for name in sorted(unread):
        base, suffix, owned = base_of(name), PurePosixPath(name).suffix.lower(), stem_of(name) in owners
        about = stem_of(base).lower() in ABOUT
        if (suffix in CAPTION_LIKE or base.lower().endswith(extension.lower())) and not about:
            if owned:
                reason = (
                    f"since the captions come from {table}" if table else "since its image has another caption file"
                )
                listing.remark(name, f"is not read, {reason}")
            else:
                listing.remark(name, "is a caption without an image of its name", loses=True)
        elif suffix == ".json" and owned:
            listing.remark(name, "is not read: captions in .json files are those of tar shards", loses=without_captions)
        elif suffix in TABLE_LIKE:
            text = f"is a table that is not read; only {', '.join(TABLE_NAMES)} are"
            listing.remark(name, text, loses=without_captions)
        elif suffix in ARCHIVES:
            listing.drop(name, f"is an archive ({suffix}), which is not read here; unpack it")
        elif _seems_an_image(root / name, suffix):
            listing.drop(name, f"is an image, but its name does not end in {', '.join(sorted(IMAGE_SUFFIXES))}")
        else:
            listing.remark(name, f"is a file of another kind, which is not read ({suffix or 'without a suffix'})")


def _seems_an_image(path: Path, suffix: str) -> bool:
    """Whether a file begins like an image, if its suffix says nothing: `IMG_0001`, `photo.jpg_large`."""
    if suffix not in _SAYS_NOTHING and not any(suffix.startswith(known) for known in IMAGE_SUFFIXES):
        return False
    try:
        with open(path, "rb") as file:
            start = file.read(12)
    except OSError:
        return False
    return start.startswith(_IMAGE_STARTS) or (start[:4] == b"RIFF" and start[8:] == b"WEBP") or start[4:8] == b"ftyp"
