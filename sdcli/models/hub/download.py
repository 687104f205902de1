"""Download a repository's files into the ordinary hub cache: continued, hashed, whole or not there."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcli.errors import BadWeights, CannotWrite, NotFound, Offline, UsageError
from sdcli.io.files import megabytes, sha256
from sdcli.io.json_files import read_json_object
from sdcli.models.hub.cache import COMMIT, cache_folder, cached_commit, repo_folder, snapshot_folder
from sdcli.models.hub.folders import whole_snapshot
from sdcli.models.hub.manifest import git_sha1, read_manifest, record
from sdcli.models.hub.network import explained, offline_by_environment, use_offline
from sdcli.models.hub.repo_files import (
    CHECKER,
    MAX_SIDE_FILE_BYTES,
    require_generation,
    wanted_files,
    wanted_of_controlnet,
    weighty_parts,
)
from sdcli.models.registry import ControlNetSpec, ModelSpec
from sdcli.models.sources import HubSource

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Progress = Callable[[str, int, int], None]
"""Called with (file, bytes of the whole pull that are here, bytes of the whole pull)."""
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class PullReport:
    """What a pull did: the snapshot's folder and commit, and what it took."""

    folder: Path
    commit: str
    files: int
    total_bytes: int
    downloaded_bytes: int
    """Bytes of the files that were not in the cache before."""
    changed: tuple[str, ...] = ()
    """Files that differ from those which the last pull of this revision recorded."""
    checker_left_out: bool = False
    """Whether the repository ships a safety checker that was left out."""


@dataclass(frozen=True)
class _Remote:
    """One file as the hub announces it."""

    path: str
    size: int
    git_sha1: str
    sha256: str | None
    """Known for large files, which the hub keeps by their hash."""

    @property
    def blob(self) -> str:
        return self.sha256 or self.git_sha1


def pull(
    spec: ModelSpec | ControlNetSpec,
    *,
    offline: bool,
    safety_checker: bool = False,
    progress: Progress = lambda *_: None,
) -> PullReport:
    """Download a hub model's (or ControlNet's) safetensors and small files into the hub cache and record their hashes.

    What is there already is hashed and kept, a damaged file is replaced, a partial one continued. A model's
    `safety_checker` is downloaded on request, and from then on with every pull of the same revision.
    Raises UsageError for another source, an unsupported family (before the network is asked) or a safety checker that
    the repository does not ship, Offline, NotFound, NoAccess, BadWeights and CannotWrite.
    """
    source = spec.source
    if not isinstance(source, HubSource):
        raise UsageError(f"model {spec.name!r} needs no download: {spec.origin()}")
    if isinstance(spec, ModelSpec):
        spec.require_supported()
    if offline or offline_by_environment():
        folder = whole_snapshot(spec, source)
        if safety_checker and not (folder / CHECKER).is_dir():
            raise Offline(f"the safety checker of {spec.name} is not in the cache, and the network is not to be used")
        return PullReport(folder, folder.name, *_counted(folder), downloaded_bytes=0)
    use_offline(False)
    with explained(source):
        return _pull(spec, source, progress, safety_checker=safety_checker)


def pull_files(
    source: HubSource, files: Sequence[str], *, offline: bool, progress: Progress = lambda *_: None
) -> PullReport:
    """Download these files of a repository, such as a LoRA, as `pull` does a model's; raises what it raises.

    Files that were pulled from it before are brought to the same commit.
    """
    if offline or offline_by_environment():
        folder = snapshot_folder(source)
        missing = next((file for file in files if not (folder / file).is_file()), None)
        if missing is not None:
            raise Offline(f"{source.repo}: {missing} is not in the cache, and the network is not to be used")
        return PullReport(folder, folder.name, len(files), sum((folder / file).stat().st_size for file in files), 0)
    use_offline(False)
    with explained(source):
        api = _api()
        commit, remote = _announced(api, source)
        absent = next((file for file in files if file not in remote), None)
        if absent is not None:
            raise NotFound(f"{source.repo} has no file {absent}")
        earlier = [path for path in read_manifest(source.repo, cached_commit(source)) if path in remote]
        return _fetched(api, source, commit, remote, list(dict.fromkeys([*files, *earlier])), source.repo, progress)


def _counted(folder: Path) -> tuple[int, int]:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


def _pull(
    spec: ModelSpec | ControlNetSpec, source: HubSource, progress: Progress, *, safety_checker: bool
) -> PullReport:
    api = _api()
    before = read_manifest(source.repo, cached_commit(source))
    commit, remote = _announced(api, source)
    folder = repo_folder(source.repo) / "snapshots" / commit
    sizes = {path: file.size for path, file in remote.items()}
    index: dict[str, Any] = {}
    if "model_index.json" in remote and sizes["model_index.json"] <= MAX_SIDE_FILE_BYTES:
        _fetch(api, source, commit, remote["model_index.json"], folder, lambda _: None)
        index = read_json_object(folder / "model_index.json")
        require_generation(index, name=spec.name)
    ships_checker = index.get(CHECKER) not in (None, [None, None])
    if safety_checker and not ships_checker:
        raise UsageError(f"{source.repo} ships no safety checker")
    with_checker = ships_checker and (safety_checker or any(path.startswith(f"{CHECKER}/") for path in before))
    if "model_index.json" not in remote and "config.json" in remote:
        wanted = wanted_of_controlnet(sizes, source)
    else:
        parts = [*weighty_parts(index), *([CHECKER] if with_checker else [])]
        wanted = wanted_files(sizes, variant=source.variant, repo=source.repo, parts=parts)
    report = _fetched(api, source, commit, remote, wanted, spec.name, progress)
    return replace(report, checker_left_out=ships_checker and not with_checker)


def _api() -> HfApi:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()
    return HfApi(library_name="sdcli")


def _fetched(
    api: HfApi,
    source: HubSource,
    commit: str,
    remote: Mapping[str, _Remote],
    wanted: Sequence[str],
    name: str,
    progress: Progress,
) -> PullReport:
    """Bring the wanted files of a commit into the cache, and record their hashes."""
    before, folder = read_manifest(source.repo, cached_commit(source)), repo_folder(source.repo) / "snapshots" / commit
    files = [remote[path] for path in wanted]
    total = sum(file.size for file in files)
    absent = [file for file in files if not _is_whole(folder / file.path, file)]
    _require_disk(name, source.repo, absent)
    here = total - sum(file.size for file in absent)
    for file in absent:

        def report(done: int, path: str = file.path, here: int = here) -> None:
            progress(path, here + done, total)

        _fetch(api, source, commit, file, folder, report)
        here += file.size
        report(file.size)
    hashes = {file.path: {"size": file.size, "sha256": file.sha256 or sha256(folder / file.path)} for file in files}
    record(source, commit, hashes)
    changed = tuple(path for path, was in before.items() if path in hashes and was["sha256"] != hashes[path]["sha256"])
    return PullReport(
        folder,
        commit,
        len(files),
        total,
        sum(file.size for file in absent),
        changed,
    )


def _announced(api: HfApi, source: HubSource) -> tuple[str, dict[str, _Remote]]:
    """The revision's commit and the repository's files at that commit."""
    from huggingface_hub.hf_api import RepoFile

    commit = api.model_info(source.repo, revision=source.revision, timeout=20).sha
    if commit is None or not COMMIT.fullmatch(commit):
        raise BadWeights(f"{source.repo}: the hub names no commit for {source.revision}")
    remote = {}
    for entry in api.list_repo_tree(source.repo, recursive=True, revision=commit):
        if isinstance(entry, RepoFile):
            hash_of_large = entry.lfs.sha256 if entry.lfs else None
            if not _HASH.fullmatch(hash_of_large or entry.blob_id) or entry.size < 0:  # it names a file of ours
                raise BadWeights(f"{source.repo}: the hub gives no proper hash and size of {entry.path}")
            remote[entry.path] = _Remote(entry.path, entry.size, entry.blob_id, hash_of_large)
    return commit, remote


def _require_disk(name: str, repo: str, absent: list[_Remote]) -> None:
    partial = [_partial(repo, file) for file in absent]
    needed = sum(file.size for file in absent) - sum(path.stat().st_size for path in partial if path.is_file())
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise CannotWrite(
            f"pulling {name} needs {megabytes(needed)} of disk and {cache} has {megabytes(free)} free "
            "(HF_HOME moves the cache)"
        )


def _fetch(
    api: HfApi, source: HubSource, commit: str, file: _Remote, folder: Path, progress: Callable[[int], None]
) -> None:
    """Bring one file into the snapshot, whole and with the announced hash."""
    target = folder / file.path
    if _is_whole(target, file):
        return
    _drop_damaged(target, file, repo=source.repo)
    if file.sha256:
        _fetch_blob(source, commit, file, progress)
    api.hf_hub_download(source.repo, file.path, revision=commit)
    hashed_already = file.sha256 and target.resolve() == repo_folder(source.repo) / "blobs" / file.blob
    if not hashed_already and not _is_whole(target, file):
        size = target.stat().st_size
        _drop_damaged(target, file, repo=source.repo)
        raise BadWeights(_damaged(source, file, size))


def _drop_damaged(target: Path, file: _Remote, *, repo: str) -> None:
    """Remove a snapshot's file and its blob, which hf_hub_download would take for whole; a whole blob stays."""
    for blob in {target.resolve(), repo_folder(repo) / "blobs" / file.blob}:
        if blob.is_file() and not _is_whole(blob, file):
            blob.unlink()
    target.unlink(missing_ok=True)


def _fetch_blob(source: HubSource, commit: str, file: _Remote, progress: Callable[[int], None]) -> None:
    """Download a large file to its place among the cache's blobs, continuing what an earlier process left.

    huggingface_hub itself keeps no partial file when a process ends, so a lost line at 3 of 4 GB would begin again.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    partial = _partial(source.repo, file)
    blob = partial.with_name(file.blob)
    lock = cache_folder() / ".locks" / repo_folder(source.repo).name / f"{file.blob}.lock"
    for path in (partial, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.is_file():
            return
        with _Reporting(partial, progress) as out:
            if out.tell() > file.size:
                out.truncate(0)
            if out.tell() < file.size:
                url = hf_hub_url(source.repo, file.path, revision=commit)
                headers = build_hf_headers(library_name="sdcli") | {"Accept-Encoding": "identity"}
                http_get(url, out, resume_size=out.tell(), headers=headers, displayed_filename=file.path)
            size = out.tell()
        if size < file.size:
            raise BadWeights(_damaged(source, file, size) + "; pull again to continue")
        if not _is_whole(partial, file):
            partial.unlink()
            raise BadWeights(_damaged(source, file, size))
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, blob)


class _Reporting(io.FileIO):
    """A file that is appended to and reports its length after each write."""

    def __init__(self, path: Path, progress: Callable[[int], None]) -> None:
        super().__init__(path, "ab")
        self._progress = progress

    def write(self, data: Any) -> int:
        # A raw file may take less than it was given, which http_get does not expect.
        view = memoryview(data)
        written = 0
        while written < len(view):
            written += super().write(view[written:]) or 0
        self._progress(self.tell())
        return written


def _partial(repo: str, file: _Remote) -> Path:
    return repo_folder(repo) / "blobs" / f"{file.blob}.sdcli-partial"


def _damaged(source: HubSource, file: _Remote, size: int) -> str:
    if size != file.size:
        return f"{source.repo}: {file.path} came with {size} bytes and the hub announces {file.size}"
    return f"{source.repo}: {file.path} came damaged (its hash is not the one the hub announces); pull again"


def _is_whole(path: Path, file: _Remote) -> bool:
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    return sha256(path) == file.sha256 if file.sha256 else git_sha1(path) == file.git_sha1
