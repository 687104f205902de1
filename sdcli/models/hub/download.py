"""The Hugging Face hub: a repository's files in the ordinary cache, pulled, recorded and verified."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from sdcli.errors import BadWeights, CannotWrite, NotFound, Offline, UsageError, first_line
from sdcli.io.files import PACKAGE, sha256, write_whole
from sdcli.io.json_files import parse_json, read_json_object
from sdcli.io.weight_files import shard_names
from sdcli.models.families import FAMILIES
from sdcli.models.hub.cache import COMMIT, cache_folder, cached_commit, ref_file, repo_folder, snapshot_folder
from sdcli.models.registry import ControlNetSpec, ModelSpec
from sdcli.models.sources import EmbeddedSource, FolderSource, HubSource

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Progress = Callable[[str, int, int], None]
"""Called with (file, bytes of the whole pull that are here, bytes of the whole pull)."""

WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "text_encoder_3": "model",
}
"""Component -> the stem of its weight files."""
CONTROLNET_WEIGHTS = "diffusion_pytorch_model"
"""The same of a ControlNet, whose repository is one network."""
_TOKENIZER = {
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
}
SIDE_FILES = {
    **{part: {"config.json"} for part in WEIGHTS},
    "tokenizer": _TOKENIZER,
    "tokenizer_2": _TOKENIZER,
    "tokenizer_3": _TOKENIZER - {"vocab.json", "merges.txt"},
    "scheduler": {"scheduler_config.json"},
}
"""Component -> the small files it may have; no other name is ever downloaded."""
CHECKER = "safety_checker"
CHECKER_SIDE_FILES = {f"{CHECKER}/config.json", "feature_extractor/preprocessor_config.json"}
"""What a safety checker has beside its weights; both are downloaded with it alone."""
MAX_SIDE_FILE_BYTES = 32 * 1024**2
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class NoAccess(NotFound):
    """The repository is there, and the hub does not give it to this user."""


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
class VerifyReport:
    """The files compared with what is recorded. Each difference is a sentence that names its file."""

    folder: Path
    commit: str
    files: int
    differences: tuple[str, ...]
    recorded: bool
    """Whether a manifest of `pull` was there; without one the cache's blob names, which are hashes, are compared."""


def use_offline(offline: bool) -> None:
    """Set the libraries' environment: no telemetry and no remote code ever, no network if `offline`.

    huggingface_hub and diffusers read it when they are imported, so this comes first. A user's own
    HF_HUB_OFFLINE=1 stays in force.
    """
    os.environ |= {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "DIFFUSERS_DISABLE_REMOTE_CODE": "1",
        # Xet downloads cannot be resumed by another process; plain HTTP can, by Range.
        "HF_HUB_DISABLE_XET": "1",
    }
    if offline:
        os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def offline_by_environment() -> bool:
    """Whether HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids the network."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in {"1", "ON", "YES", "TRUE"}


def folder_of(spec: ModelSpec | ControlNetSpec) -> Path | None:
    """The folder that a model or ControlNet is loaded from; None for a single file and random weights.

    Never touches the network. Raises Offline, with the command that downloads it, where a hub's is not wholly here.
    """
    match spec.source:
        case EmbeddedSource(folder=name):
            return PACKAGE / name
        case FolderSource(path=path):
            return path
        case HubSource() as source:
            return _whole_snapshot(spec, source)
    return None


def tokenizer_folder(spec: ModelSpec) -> Path:
    """Where a text model's tokenizer is. Raises Offline for a hub model that is not in the cache."""
    folder = folder_of(spec)
    return folder / "tokenizer" if folder is not None else PACKAGE / "encoders/clip_tokenizer"


def _whole_snapshot(spec: ModelSpec | ControlNetSpec, source: HubSource) -> Path:
    folder = snapshot_folder(source)
    what = f"{'model' if isinstance(spec, ModelSpec) else 'ControlNet'} {spec.name!r}"
    size = f" ({megabytes(spec.download_bytes)})" if spec.download_bytes else ""
    advice = f"run `sdcli models pull {spec.name}`{size}"
    if not folder.is_dir():
        raise Offline(f"{what} is not in the cache {cache_folder()}; {advice}")
    missing = first_missing(folder, spec)
    if missing:
        raise Offline(f"{what} is only partly in the cache: {missing} is missing; {advice}")
    return folder


def first_missing(folder: Path, spec: ModelSpec | ControlNetSpec) -> str | None:
    """The first file that a model's (or ControlNet's) folder lacks to be generated with, or None. Raises BadWeights."""
    present = {
        path.relative_to(folder).as_posix()
        for pattern in ("*", "*/*")
        for path in folder.glob(pattern)
        if path.is_file()
    }
    if isinstance(spec, ControlNetSpec):
        required, stems = ["config.json"], [CONTROLNET_WEIGHTS]
    elif "model_index.json" not in present:
        return "model_index.json"
    else:
        index: dict[str, Any] = {}
        with contextlib.suppress(BadWeights):  # loading reports it
            index = read_json_object(folder / "model_index.json")
        parts = weighty_parts(index)
        stems = [f"{part}/{WEIGHTS[part]}" for part in parts]
        required = [*(f"{part}/config.json" for part in parts), "scheduler/scheduler_config.json"]
        for tokenizer in (one.replace("text_encoder", "tokenizer") for one in parts if one.startswith("text_encoder")):
            if tokenizer == "tokenizer_3":
                required.append(f"{tokenizer}/tokenizer.json")
            elif f"{tokenizer}/tokenizer.json" not in present:
                required += [f"{tokenizer}/vocab.json", f"{tokenizer}/merges.txt"]
    for stem in stems:
        names = weight_files(present, stem, variant=getattr(spec.source, "variant", None))
        required += names or [f"{stem}.safetensors"]
        for listing in (name for name in names if name.endswith(".index.json")):
            below = stem.rpartition("/")[0]
            required += [f"{below}/{shard}".removeprefix("/") for shard in shard_names(folder / listing)]
    return next((file for file in required if file not in present), None)


def weighty_parts(model_index: Mapping[str, Any]) -> list[str]:
    """The components with weights: UNet or transformer, VAE, and the text encoders that are named, one at least.

    An SDXL refiner's `text_encoder` is [null, null].
    """
    named = [part for part in WEIGHTS if part.startswith("text") and model_index.get(part) not in (None, [None, None])]
    denoiser = "unet" if model_index.get("transformer") is None else "transformer"
    return [denoiser, "vae", *(named or ["text_encoder"])]


def weight_files(present: Iterable[str], stem: str, *, variant: str | None) -> list[str]:
    """The safetensors files of one network among repo paths: the variant's where it has them, else the plain ones.

    `stem` is what their names begin with: `unet/diffusion_pytorch_model`.
    """
    paths = sorted(present)
    for suffix in ([f".{variant}"] if variant else []) + [""]:
        whole = f"{stem}{suffix}.safetensors"
        if whole in paths:
            return [whole]
        # Two spellings of a sharded variant are in use: name.fp16-00001-of and name-00001-of...fp16.
        for index in (f"{stem}.safetensors.index{suffix}.json", f"{stem}{suffix}.safetensors.index.json"):
            if index in paths:
                shards = [
                    path
                    for path in paths
                    if fnmatch.fnmatchcase(path, f"{stem}{suffix}-?????-of-?????.safetensors")
                    or fnmatch.fnmatchcase(path, f"{stem}-?????-of-?????{suffix}.safetensors")
                ]
                return [index, *shards]
    return []


def wanted_files(
    present: Mapping[str, int],
    *,
    variant: str | None,
    repo: str,
    parts: Iterable[str] = ("unet", "vae", "text_encoder"),
) -> list[str]:
    """Which of a repository's files (path -> bytes) to download for some `weighty_parts`, the small ones first.

    The safety checker may be one of the parts. Raises BadWeights.
    """
    parts = list(parts)
    checker = CHECKER_SIDE_FILES if CHECKER in parts else set()
    small = [
        path
        for path in sorted(present)
        if path == "model_index.json"
        or path.partition("/")[2] in SIDE_FILES.get(path.partition("/")[0], ())
        or path in checker
    ]
    if "model_index.json" not in small:
        single = [path for path in present if "/" not in path and path.endswith(".safetensors")]
        hint = f"; download {single[0]} yourself and give its path as the model" if single else ""
        raise BadWeights(f"{repo} is not in the diffusers layout: it has no model_index.json{hint}")
    weights: list[str] = []
    for part in parts:
        stem = f"{part}/{'model' if part == CHECKER else WEIGHTS[part]}"
        names = weight_files(present, stem, variant=variant)
        if not names:
            if any(path.startswith(f"{part}/") and path.endswith((".bin", ".ckpt", ".pt")) for path in present):
                raise BadWeights(
                    f"{repo} has its {part} only as a pickle, which can run any code when opened; sdcli downloads "
                    "safetensors only (look for a revision or another repository that has them)"
                )
            raise BadWeights(f"{repo} has no {stem}.safetensors")
        weights += names
    for path in small:
        if present[path] > MAX_SIDE_FILE_BYTES:
            raise BadWeights(f"{repo}: {path} has {megabytes(present[path])}, which no such file has")
    return small + [path for path in weights if path not in small]


def _wanted_of_controlnet(present: Mapping[str, int], source: HubSource) -> list[str]:
    """Which files to download of a repository that is one network, with its config.json at the top."""
    weights = weight_files(present, CONTROLNET_WEIGHTS, variant=source.variant)
    if not weights:
        raise BadWeights(f"{source.repo} has no {CONTROLNET_WEIGHTS}.safetensors, as a ControlNet has")
    if present["config.json"] > MAX_SIDE_FILE_BYTES:
        raise BadWeights(f"{source.repo}: config.json has {megabytes(present['config.json'])}, which no such file has")
    return ["config.json", *weights]


def require_generation(model_index: Mapping[str, Any], *, name: str) -> None:
    """Raise UsageError where model_index.json is of a pipeline that sdcli does not know."""
    pipeline = model_index.get("_class_name")
    known = sorted(one for family in FAMILIES.values() if family.reads_text for one in family.pipelines)
    if pipeline not in known:
        raise UsageError(
            f"model {name!r} is made for {pipeline or 'an unnamed pipeline'}, which is not supported "
            f"(supported: {', '.join(known)})"
        )


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
        folder = _whole_snapshot(spec, source)
        if safety_checker and not (folder / CHECKER).is_dir():
            raise Offline(f"the safety checker of {spec.name} is not in the cache, and the network is not to be used")
        return PullReport(folder, folder.name, *_counted(folder), downloaded_bytes=0)
    use_offline(False)
    with _explained(source):
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
    with _explained(source):
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
        wanted = _wanted_of_controlnet(sizes, source)
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
    _record(source, commit, hashes)
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


def _record(source: HubSource, commit: str, hashes: dict[str, dict[str, Any]]) -> None:
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


def verify(spec: ModelSpec | ControlNetSpec) -> VerifyReport:
    """Hash the cached files and compare them with the manifest. Raises UsageError for another source, and Offline."""
    source = spec.source
    if not isinstance(source, HubSource):
        raise UsageError(f"model {spec.name!r} was not pulled, so no hashes are recorded: {spec.origin()}")
    commit = cached_commit(source)
    folder = snapshot_folder(source)
    if not folder.is_dir():
        _whole_snapshot(spec, source)
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


def megabytes(size: int) -> str:
    """A size for people: 512 KB, 34 MB, 2.1 GB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= factor:
            value = size / factor
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{size} bytes"


@contextlib.contextmanager
def _explained(source: HubSource) -> Iterator[None]:
    """Turn what huggingface_hub raises into our own errors, each with its sentence."""
    from huggingface_hub import errors as hub

    repo, host = source.repo, _host()
    try:
        yield
    except hub.GatedRepoError:
        raise NoAccess(
            f"{repo} is gated: accept its licence on {host}/{repo} and set HF_TOKEN to a token of that account"
        ) from None
    except hub.RepositoryNotFoundError:
        raise NotFound(f"no repository {repo} on {host} (or it is private: then set HF_TOKEN)") from None
    except hub.RevisionNotFoundError:
        raise NotFound(f"{repo} has no revision {source.revision!r}") from None
    except hub.LocalEntryNotFoundError as error:
        raise Offline(f"cannot reach {host} for {repo}: {first_line(error.__cause__ or error)}") from None
    except hub.EntryNotFoundError as error:
        raise BadWeights(f"{repo}: the hub lists a file that it does not have: {first_line(error)}") from None
    except hub.DisabledRepoError:
        raise NoAccess(f"{repo} has been disabled by {host}") from None
    except hub.HfHubHTTPError as error:
        raise _refused(error, repo, host) from None
    except (hub.HTTPError, hub.OfflineModeIsEnabled) as error:
        raise Offline(f"cannot reach {host} for {repo}: {first_line(error)}; what came so far is kept") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CannotWrite(f"the disk of {cache_folder()} is full; what came so far is kept") from None
        if error.errno is not None:
            raise CannotWrite(f"cannot write to {cache_folder()}: {error.strerror}") from None
        raise BadWeights(f"{repo}: {first_line(error)}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadWeights(f"{host} answered something else than the hub does: {first_line(error)}") from error


def _refused(error: Any, repo: str, host: str) -> Exception:
    status, reason = error.response.status_code, error.response.headers.get("X-Error-Message", "")
    if status == 403 or "credentials" in reason:
        return NoAccess(f"{host} refuses {repo} ({status}): check that HF_TOKEN is valid and may read it")
    if status == 429:
        return Offline(f"{host} refuses for now: too many requests (429); try again later, or set HF_TOKEN")
    if status in (401, 404):  # the hub answers 401 also for what does not exist
        return NotFound(f"no repository {repo} on {host} (or it is private: then set HF_TOKEN)")
    return Offline(f"{host} answers with an error ({status}) for {repo}; try again later")


def _host() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
