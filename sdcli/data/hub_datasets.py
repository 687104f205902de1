"""Data sets of the Hugging Face hub: the parquet files of a split at one commit, read in parts over the network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdcli.data.parquet import ParquetRows, open_rows
from sdcli.errors import NotFound, Offline, UsageError, first_line
from sdcli.models.hub.network import offline_by_environment, use_offline

HUB_DATA = re.compile(
    r"(?P<sure>hf://datasets/)?(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?"
)
"""`owner/name`, optionally with configuration and revision: `owner/name:config@revision`.

The prefix `hf://datasets/` distinguishes it from a folder."""
EXPORT = "refs/convert/parquet"
"""The branch where the hub keeps a parquet copy of data sets in other formats."""


@dataclass(frozen=True)
class HubFiles:
    """The parquet files of one split, as fsspec URLs that name the commit, so that they never change."""

    urls: tuple[str, ...]
    features: Mapping[str, Any]


def open_hub(
    data: str, *, image_column: str | None = None, caption_column: str | None = None, split: str = "train"
) -> ParquetRows:
    """The images of a data set on the hub, read row group by row group when they are needed; nothing is stored.

    Raises Offline, NotFound (no such data set), and UsageError (no such split or column, or a package is missing).
    """
    match = HUB_DATA.fullmatch(data)
    if match is None:
        raise UsageError(f"{data!r} is not the id of a data set on the hub (owner/name)")
    if offline_by_environment():
        raise Offline(
            f"there is no folder {data}; as a data set of the hub it would need the network, which HF_HUB_OFFLINE "
            f"forbids (`hf download {match['repo']} --repo-type dataset --local-dir DIR` fetches it elsewhere)"
        )
    use_offline(False)
    found = resolve(match["repo"], config=match["config"], revision=match["revision"], split=split)
    return open_rows(
        found.urls,
        names=_short_names(found.urls),
        source=data,
        stamps=found.urls,
        remote=True,
        image_column=image_column,
        caption_column=caption_column,
        features=found.features,
    )


def resolve(repo: str, *, config: str | None, revision: str | None, split: str) -> HubFiles:
    """Ask the hub, through `datasets`, which parquet files a split has. Raises as `open_hub`."""
    builder = _builder(repo, config, revision)
    if builder.name != "parquet" and revision is None:
        builder = _builder(repo, config, EXPORT)  # the hub's own copy of what is in another format
    if builder.name != "parquet":
        raise UsageError(
            f"{repo} holds {builder.name} instead of parquet files; download it with `hf download {repo} "
            "--repo-type dataset --local-dir DIR` and use DIR"
        )
    files = {str(name): tuple(map(str, urls)) for name, urls in (builder.config.data_files or {}).items()}
    if split == "all":
        urls = tuple(url for name in files for url in files[name])
    elif split in files:
        urls = files[split]
    else:
        raise UsageError(f"{repo} has no split {split!r}; it has {', '.join(files)} (--split)")
    features = builder.info.features
    return HubFiles(urls, features.to_dict() if features is not None else {})


def _builder(repo: str, config: str | None, revision: str | None) -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError("data sets of the hub need the package datasets: pip install 'sdcli[data]'") from None
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it logs every attempt to connect; the error below is enough
    datasets.utils.logging.set_verbosity_error()
    try:
        # With the prefix, a local folder of this name is not used instead.
        builder = datasets.load_dataset_builder(f"hf://datasets/{repo}", config, revision=revision)
    except DatasetNotFoundError as error:
        raise NotFound(
            f"there is neither a folder {repo} nor a data set of that name on the hub "
            f"(or it is private: then set HF_TOKEN): {first_line(error)}"
        ) from None
    except (ConnectionError, TimeoutError) as error:
        raise Offline(f"there is no folder {repo}, and the hub cannot be reached: {first_line(error)}") from None
    except ValueError as error:  # an unknown configuration, or several of which none was chosen
        raise UsageError(f"{repo}: {' '.join(str(error).split())} (choose one with owner/name:config)") from None
    except (OSError, RuntimeError) as error:
        raise NotFound(f"{repo} cannot be read as a data set: {first_line(error)}") from None
    if builder.name == "cache":  # from an earlier run of `datasets`, when the hub cannot be reached
        raise Offline(f"there is no folder {repo}, and the hub cannot be reached")
    return builder


def _short_names(urls: tuple[str, ...]) -> list[str]:
    """The files' paths below their common folder."""
    folders = [url.split("/")[:-1] for url in urls]
    depth = 0
    while folders and all(len(path) > depth for path in folders) and len({path[depth] for path in folders}) == 1:
        depth += 1
    return ["/".join(url.split("/")[depth:]) for url in urls]
