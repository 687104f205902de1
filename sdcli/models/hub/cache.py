"""Where the ordinary Hugging Face cache keeps a repository's files, found without huggingface_hub or the network."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sdcli.errors import UsageError
from sdcli.io.files import expanded
from sdcli.models.sources import HubFile, HubSource

COMMIT = re.compile(r"[0-9a-f]{40}")
"""A commit's name."""


def cache_folder() -> Path:
    """The hub cache, by the same variables and in the same order as huggingface_hub, without importing it."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return expanded(os.path.expandvars(cache)).resolve()


def repo_folder(repo: str) -> Path:
    """Where the cache keeps a repository: its blobs, refs and snapshots."""
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def cached_commit(source: HubSource) -> str | None:
    """The commit that the cache knows for the source's revision, or None."""
    if COMMIT.fullmatch(source.revision):
        return source.revision
    try:
        commit = ref_file(source).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return commit if COMMIT.fullmatch(commit) else None


def ref_file(source: HubSource) -> Path:
    """Where the cache notes the commit of a branch or tag. Raises UsageError for a name that would lead elsewhere."""
    refs = repo_folder(source.repo) / "refs"
    if {"", ".", ".."} & set(source.revision.split("/")):
        raise UsageError(f"{source.revision!r} cannot be a revision of {source.repo}")
    return refs / source.revision


def snapshot_folder(source: HubSource) -> Path:
    """Where the cache has the source's revision, if it has it."""
    return repo_folder(source.repo) / "snapshots" / (cached_commit(source) or "none")


def cached_file(file: HubFile) -> Path:
    """Where the cache has one file of a repository, if it has it."""
    return snapshot_folder(file.source) / file.file
