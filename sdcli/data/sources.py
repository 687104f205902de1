"""Opens DATA as an image set: a folder, a file, a pattern, or a data set of the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from sdcli.data.file_tree import (
    ALL_SPLITS,
    LATENT_SUFFIXES,
    Tree,
    scan,
    split_by_name,
    split_of_files,
    split_of_path,
)
from sdcli.data.folders import open_folder
from sdcli.data.hub_datasets import HUB_DATA, open_hub
from sdcli.data.latent_folders import open_latents
from sdcli.data.parquet import ParquetRows, open_rows
from sdcli.data.patterns import matches
from sdcli.data.records import DroppedItem, ImageSet, Remark, file_stamp
from sdcli.data.webdataset import TarShards, open_shards
from sdcli.errors import NotFound, UsageError
from sdcli.images.formats import IMAGE_SUFFIXES
from sdcli.io.files import expanded

LOOKED_FOR = (
    f"images ({', '.join(sorted(IMAGE_SUFFIXES))}), tar shards (.tar), parquet files (.parquet) "
    "or latents (.safetensors)"
)


class ColumnNames(NamedTuple):
    """The columns that the user named."""

    image_column: str | None
    caption_column: str | None


def open_images(
    data: str | Path,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    caption_extension: str = ".txt",
    split: str = "train",
) -> ImageSet:
    """List the captioned images of `data`; nothing is ever written there.

    - a folder of images: with metadata.jsonl, .csv or .parquet (Hugging Face's imagefolder), with a caption file
      beside each (kohya; each line is an alternative), or in class folders;
    - a folder, file or pattern of parquet files (Hugging Face's datasets) or of tar shards (WebDataset as img2dataset
      writes it): `shards/{00000..00099}.tar`, `data/train-*.parquet`;
    - a folder of latents that `sdcli encode` wrote: `kind` is "latents", and there is `read_latents`;
    - `owner/name`, `owner/name:config@revision`: a data set of the hub, streamed; if a folder `owner` exists,
      it counts as a mistyped path unless it begins with `hf://datasets/`.

    Sub-folders called train, validation or test are splits, and so are files with such a word in their name; `split`
    chooses one, or "all". Of a file or a pattern "train", the default, is all that it names. Items that cannot be
    used are in `dropped`. Raises NotFound, UsageError for ambiguous data, Offline for the hub, and BadLatents.
    """
    source = os.fspath(data)
    path = expanded(source)
    extension = _extension(caption_extension)
    columns = ColumnNames(image_column, caption_column)
    if path.is_dir():
        return _open_folder(path, source=source, extension=extension, split=split, columns=columns)
    if os.path.lexists(path):
        return _open_given([str(path)], source=source, extension=extension, columns=columns, split=split)
    if re.search(r"[*?\[{]", source):
        files, absent = matches(os.path.expanduser(source))
        return _open_given(files, source=source, extension=extension, columns=columns, split=split, dropped=absent)
    hub = HUB_DATA.fullmatch(source)
    if hub is not None and (hub["sure"] or not path.parent.is_dir()):
        return open_hub(source, image_column=image_column, caption_column=caption_column, split=split)
    advice = f" (hf://datasets/{source} would be a data set of the hub)" if hub is not None else ""
    raise NotFound(f"there is no folder or file {source}{advice}")


def _open_folder(root: Path, *, source: str, extension: str, split: str, columns: ColumnNames) -> ImageSet:
    tree = scan(root)
    beside_tars = {PurePosixPath(name).with_suffix("") for name in tree.tars}
    parquets = [name for name in tree.parquets if PurePosixPath(name).with_suffix("") not in beside_tars]
    kinds = {
        "pictures": tree.images,
        "tar shards": tree.tars,
        "parquet files": parquets,  # without those that img2dataset writes beside its shards
        "latents": tree.latents,
    }
    there = {kind: names for kind, names in kinds.items() if names}
    if not there:
        raise NotFound(f"{source} holds nothing to train on: {_nothing(tree)}; looked for {LOOKED_FOR}")
    if len(there) > 1:
        found = " and ".join(f"{kind} ({len(names):,}: {names[0]}, ...)" for kind, names in there.items())
        raise UsageError(
            f"{source} holds {found}, which is ambiguous: give a pattern for shards or parquet files "
            f"('{source}/*.tar'), or a sub-folder of one kind"
        )
    if tree.images:
        return open_folder(tree, source=source, caption_extension=extension, split=split, **columns._asdict())
    if tree.latents:
        _refuse_columns(columns, source, "latents")
        return open_latents(tree, source=source, caption_extension=extension, split=split)
    names, silent = split_by_name(next(iter(there.values())), split=split, source=source)
    files = [str(root / name) for name in names]
    dropped = (*tree.dropped, *silent)
    opened = _open_files(files, names=names, source=source, extension=extension, columns=columns, dropped=dropped)
    return replace(opened, remarks=(*opened.remarks, *_beside(tree, names, split=split)))


def _beside(tree: Tree, names: Sequence[str], *, split: str) -> Iterator[Remark]:
    """What else a folder of shards or parquet files holds, such as the figures that img2dataset writes beside each."""
    others = sorted({*tree.tars, *tree.parquets, *tree.tables, *tree.others}.difference(names))
    stems = {PurePosixPath(name).with_suffix("").as_posix() for name in tree.tars}
    for name in others:
        stem = PurePosixPath(name).with_suffix("").as_posix().removesuffix("_stats")
        if name in tree.tars or (name in tree.parquets and stem not in stems):
            if split_of_path(name) is not None:
                yield Remark(name, f"belongs to another split than {split!r}")
        elif stem in stems:
            yield Remark(name, "belongs to a shard and is not read: captions are in the shards")
        else:
            yield Remark(name, "is beside the shards or parquet files and is not read")


def _open_given(
    files: Sequence[str],
    *,
    source: str,
    extension: str,
    columns: ColumnNames,
    split: str,
    dropped: Sequence[DroppedItem] = (),
) -> ParquetRows | TarShards:
    """The files that DATA names one by one; those of a split where one is asked for."""
    chosen, silent = split_of_files(files, split=split, source=source)
    dropped = (*dropped, *silent)
    opened = _open_files(chosen, source=source, extension=extension, columns=columns, dropped=dropped)
    splits = sorted({found for name in _short_names(chosen) if (found := split_of_path(name)) is not None})
    if split == ALL_SPLITS or len(splits) < 2:
        return opened
    mixed = Remark(
        source,
        f"matches files of several splits ({', '.join(splits)}), all of which are used; --split all "
        "confirms that, and a pattern that matches the files of one split leaves out the others",
    )
    return replace(opened, remarks=(*opened.remarks, mixed))


def _open_files(
    files: Sequence[str],
    *,
    source: str,
    extension: str,
    columns: ColumnNames,
    dropped: Sequence[DroppedItem],
    names: Sequence[str] | None = None,
) -> ParquetRows | TarShards:
    """Shards or parquet files, all of one kind."""
    names = _short_names(files) if names is None else names
    suffixes = {PurePosixPath(file).suffix.lower() for file in files}
    if suffixes == {".parquet"}:
        stamps = [file_stamp(Path(file)) for file in files]
        return open_rows(
            files,
            names=names,
            source=source,
            stamps=stamps,
            image_column=columns.image_column,
            caption_column=columns.caption_column,
            dropped=dropped,
        )
    if suffixes <= {".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst"}:
        _refuse_columns(columns, source, "tar shards")
        paths = [Path(file) for file in files]
        return open_shards(paths, names=names, source=source, caption_extension=extension, dropped=dropped)
    if suffixes & (IMAGE_SUFFIXES | LATENT_SUFFIXES | {".jsonl", ".csv"}):
        raise UsageError(f"{source} is not a folder but single files; give the folder that contains them")
    raise UsageError(f"{source} is neither a folder nor tar shards nor parquet files; looked for {LOOKED_FOR}")


def _short_names(files: Sequence[str]) -> list[str]:
    """The files' paths relative to their common folder."""
    above = os.path.dirname(files[0]) if len(files) == 1 else os.path.commonpath([os.path.dirname(f) for f in files])
    return [os.path.relpath(file, above or ".").replace(os.sep, "/") for file in files]


def _extension(typed: str) -> str:
    extension = typed if typed.startswith(".") else f".{typed}"
    if len(extension) < 2 or "/" in extension or extension.lower() in IMAGE_SUFFIXES | {".json", ".tar"}:
        raise UsageError(f"{typed!r} cannot be the extension of caption files (the usual one is .txt)")
    return extension


def _refuse_columns(columns: ColumnNames, source: str, kind: str) -> None:
    for option, column in columns._asdict().items():
        if column is not None:
            raise UsageError(f"--{option.replace('_', '-')} is for tables and parquet files; {source} holds {kind}")


def _nothing(tree: Tree) -> str:
    count = len(tree.others) + len(tree.tables)
    if tree.dropped:
        return f"{tree.dropped[0].name} {tree.dropped[0].reason}"
    return f"only files of other kinds ({count:,})" if count else "it is empty"
