"""A small server on 127.0.0.1 that speaks the part of the Hugging Face hub's protocol which a download uses."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sdcli.models.hub.cache import repo_folder

LARGE_BYTES = 100_000
"""The hub keeps larger files apart ("LFS"), names them by SHA-256 and redirects to another place."""


@dataclass
class Repo:
    """A repository: its revisions (name -> commit) and the files of each commit."""

    revisions: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: dict[str, bytes], *, revision: str = "main") -> str:
        """Add a commit and point the revision at it; returns its name (40 hex digits)."""
        text = repr(sorted((path, hashlib.sha1(data).hexdigest()) for path, data in files.items()))
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name] = files
        self.revisions[revision] = name
        return name

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.revisions.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


@dataclass
class Faults:
    """What goes wrong, by the path of the file."""

    cut_after: dict[str, list[int]] = field(default_factory=dict)
    """Close the line after so many bytes: one number for each request, then all is well again."""
    hold_after: dict[str, int] = field(default_factory=dict)
    """Send so many bytes and then nothing more."""
    instead: dict[str, bytes] = field(default_factory=dict)
    """Send this in place of what was announced."""
    announced_size: dict[str, int] = field(default_factory=dict)
    """Claim this size in the listing."""
    oid: str | None = None
    """Give every file this hash in the listing."""
    status: int | None = None
    """Answer every request so."""


@dataclass(frozen=True)
class Served:
    """One request: method, path, Range header, how many bytes of a file were sent, and whether it showed a token."""

    method: str
    path: str
    range: str | None
    sent: int
    token: bool


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that was killed is part of the tests."""


class HubServer:
    """The running server; `url` goes into HF_ENDPOINT."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults = Faults()
        self.log: list[Served] = []
        self._http = _QuietServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.storage_url = f"http://localhost:{self._http.server_port}"
        """Large files come from another host, as on the hub."""

    @contextlib.contextmanager
    def running(self) -> Iterator[HubServer]:
        thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()

    def sent(self, path: str) -> list[Served]:
        """The GET requests for the content of one file."""
        return [served for served in self.log if served.method == "GET" and served.path.endswith(path) and served.sent]

    def weight_bytes_sent(self) -> int:
        return sum(served.sent for served in self.log if served.path.endswith(".safetensors"))


def cached(repo: str, folder: Path) -> Path:
    """Put a model's folder into the hub's cache, as a pull of `main` leaves it; its snapshot."""
    commit = "0" * 40
    snapshot = repo_folder(repo) / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text(commit)
    return snapshot


def files_of(folder: Path) -> dict[str, bytes]:
    """A folder as repository content."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
    }


def _handler(server: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, *_: Any) -> None:
            pass

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            parts = path.split("/")
            if self.headers.get("Authorization") == "Bearer hf_expired":
                return self._refuse(401, message="Invalid credentials in Authorization header")
            if server.faults.status:
                return self._refuse(server.faults.status)
            try:
                if parts[:2] == ["api", "models"]:
                    self._api("/".join(parts[2:4]), parts[4:])
                elif parts[2:3] == ["resolve"]:
                    self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), with_body)
                elif parts[2:3] == ["stored"]:
                    self._stored("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
                else:
                    self._refuse(404)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def _api(self, name: str, rest: list[str]) -> None:
            repo = server.repos.get(name)
            if repo is None:  # as the hub does for those who are not logged in: it does not tell private from absent
                return self._refuse(401)
            found = repo.files("/".join(rest[1:]) if len(rest) > 1 else "main")
            if found is None:
                return self._refuse(404, "RevisionNotFound")
            commit, files = found
            if rest[:1] == ["tree"]:
                return self._json([self._entry(path, data) for path, data in files.items()])
            self._json({"id": name, "sha": commit, "gated": "auto" if repo.gated else False, "tags": []})

        def _entry(self, path: str, data: bytes) -> dict[str, Any]:
            size = server.faults.announced_size.get(path, len(data))
            entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": _git_sha1(data)}
            if server.faults.oid is not None:
                entry["oid"] = server.faults.oid
            elif len(data) > LARGE_BYTES:
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}
            return entry

        def _resolve(self, name: str, revision: str, path: str, with_body: bool) -> None:
            repo = server.repos.get(name)
            if repo is None:
                return self._refuse(401)
            if repo.gated:
                return self._refuse(403, "GatedRepo")
            found = repo.files(revision)
            if found is None or path not in found[1]:
                return self._refuse(404, "EntryNotFound")
            commit, data = found[0], found[1][path]
            headers = {"X-Repo-Commit": commit}
            if len(data) > LARGE_BYTES:
                digest = hashlib.sha256(data).hexdigest()
                headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
                headers |= {"Location": f"{server.storage_url}/{name}/stored/{commit}/{path}", "Content-Length": "0"}
                self._head(302, headers)
            else:
                self._head(200, headers | {"ETag": f'"{_git_sha1(data)}"', "Content-Length": str(len(data))})
                if with_body:
                    self.wfile.write(data)
            server.log.append(Served(self.command, path, None, 0, "Authorization" in self.headers))

        def _stored(self, name: str, commit: str, path: str) -> None:
            data = server.faults.instead.get(path, server.repos[name].commits[commit][path])
            asked = self.headers.get("Range")
            start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
            headers = {"Content-Length": str(len(data) - start), "Accept-Ranges": "bytes"}
            if asked:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._head(206 if asked else 200, headers)
            cuts = server.faults.cut_after.get(path, [])
            limit = cuts.pop(0) if cuts else server.faults.hold_after.get(path, len(data))
            body = data[start : start + limit]
            server.log.append(Served(self.command, path, asked, len(body), "Authorization" in self.headers))
            self.wfile.write(body)
            if path in server.faults.hold_after:
                time.sleep(30)
            if len(body) < len(data) - start:
                self.close_connection = True

        def _json(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
            self.wfile.write(body)

        def _refuse(self, status: int, code: str = "", *, message: str = "") -> None:
            said = {"X-Error-Code": code, "X-Error-Message": message}
            self._head(status, {"Content-Length": "0"} | {name: value for name, value in said.items() if value})

        def _head(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

    return Handler


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
