"""The manifest of a pull, the hashes of its files: written by a pull, compared by `models verify`, and deleted."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import platformdirs

from sdcli.errors import CannotWrite, UsageError
from sdcli.io.files import sha256, write_whole
from sdcli.io.json_files import parse_json
from sdcli.models.hub.cache import COMMIT, cache_folder, cached_commit, ref_file, repo_folder, snapshot_folder
from sdcli.models.hub.folders import whole_snapshot
from sdcli.models.hub.network import use_offline
from sdcli.models.hub.repo_files import first_missing
from sdcli.models.registry import ControlNetSpec, ModelSpec
from sdcli.models.sources import HubSource


@dataclass(frozen=True)
class VerifyReport:
    """The files compared with what is recorded. Each difference is a sentence that names its file."""

    folder: Path
    commit: str
    files: int
    differences: tuple[str, ...]
    recorded: bool
    """Whether a manifest of `pull` was there; without one the cache's blob names, which are hashes, are compared."""


def verify(spec: ModelSpec | ControlNetSpec) -> VerifyReport:
    """Hash the cached files and compare them with the manifest. Raises UsageError for another source, and Offline."""
    source = spec.source
    if not isinstance(source, HubSource):
        raise UsageError(f"model {spec.name!r} was not pulled, so no hashes are recorded: {spec.origin()}")
    commit = cached_commit(source)
    folder = snapshot_folder(source)
    if not folder.is_dir():
        whole_snapshot(spec, source)
    assert commit is not None
    recorded = read_manifest(source.repo, commit)
    if recorded:
        differences = [_difference(folder / path, path, was) for path, was in recorded.items()]
        count = len(recorded)
    else:
        files = sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
        differences = [_unlike_its_name(path, path.relative_to(folder).as_posix()) for path in files]
        differences.append(_incomplete(folder, spec))
        count = len(files)
    return VerifyReport(folder, commit, count, tuple(filter(None, differences)), recorded=bool(recorded))


def _difference(file: Path, path: str, was: dict[str, Any]) -> str | None:
    if not file.is_file():
        return f"{path} is missing"
    size = file.stat().st_size
    if size != was["size"]:
        return f"{path} has {size} bytes, and {was['size']} were recorded"
    found = sha256(file)
    if found == was["sha256"]:
        return None
    return f"{path} has the SHA-256 {found[:12]}…, and {was['sha256'][:12]}… was recorded"


def _unlike_its_name(file: Path, path: str) -> str | None:
    """The cache names each blob by its hash: SHA-256 for large files, git's SHA-1 for small ones."""
    blob = file.resolve()
    if not blob.is_file():
        return f"{path} is missing"
    digest = {64: sha256, 40: git_sha1}.get(len(blob.name))
    found = digest(blob) if digest else blob.name
    if found == blob.name:
        return None
    return f"{path} has the hash {found[:12]}…, and the cache calls it {blob.name[:12]}…"


def _incomplete(folder: Path, spec: ModelSpec | ControlNetSpec) -> str | None:
    missing = first_missing(folder, spec)
    return f"{missing} is missing" if missing else None


def git_sha1(file: Path) -> str:
    """The SHA-1 under which git, and so the hub, keeps a small file."""
    digest = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def record(source: HubSource, commit: str, hashes: dict[str, dict[str, Any]]) -> None:
    """Write the manifest, then point the revision at the commit: an unfinished pull leaves the earlier one in use."""
    manifest = {
        "schema": 1,
        "repo": source.repo,
        "revision": source.revision,
        "commit": commit,
        "pulled": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": hashes,
    }
    text = json.dumps(manifest, indent=1) + "\n"
    write_whole(manifest_file(source.repo, commit), text.encode(), overwrite=True)
    if not COMMIT.fullmatch(source.revision):
        write_whole(ref_file(source), commit.encode(), overwrite=True)


def manifest_file(repo: str, commit: str) -> Path:
    """Where the hashes of a pulled commit are recorded (the user's data folder; XDG_DATA_HOME on Linux)."""
    return platformdirs.user_data_path("sdcli") / "pulled" / repo.replace("/", "--") / f"{commit}.json"


def read_manifest(repo: str, commit: str | None) -> dict[str, dict[str, Any]]:
    """The recorded files of a commit, path -> {size, sha256}; empty where nothing (or nonsense) is recorded."""
    if commit is None:
        return {}
    try:
        files = parse_json(manifest_file(repo, commit).read_bytes())["files"]
        return {str(path): {"size": int(file["size"]), "sha256": str(file["sha256"])} for path, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def delete_from_cache(repo: str) -> int:
    """Delete a repository from the hub cache, with its manifests. Returns the bytes freed. Raises CannotWrite."""
    use_offline(True)
    from huggingface_hub import CacheNotFound, scan_cache_dir

    shutil.rmtree(manifest_file(repo, "any").parent, ignore_errors=True)
    partials = list((repo_folder(repo) / "blobs").glob("*.sdcli-partial"))
    freed = sum(path.stat().st_size for path in partials)
    for path in partials:
        path.unlink(missing_ok=True)
    try:
        cache = scan_cache_dir(cache_folder())
    except CacheNotFound:
        return freed
    found = [entry for entry in cache.repos if entry.repo_id == repo and entry.repo_type == "model"]
    commits = [revision.commit_hash for entry in found for revision in entry.revisions]
    strategy = cache.delete_revisions(*commits)
    strategy.execute()
    if any(entry.repo_path.exists() for entry in found):
        raise CannotWrite(f"could not delete {repo_folder(repo)} (no permission?)")
    return freed + strategy.expected_freed_size
