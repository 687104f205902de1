"""Claims: processes that fill one cache divide the work among them through files in its folder, without a server.

A claim is a file that only one process can make. Its holder touches it every few seconds; of a process that is gone, it
is taken over: on the same machine at once, on another when the file has not been touched for a minute. Claims save work
and protect nothing: records have content keys, so that two processes that do the same lose time and no bytes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from sdcli.errors import CannotWrite
from sdcli.io.temporary_files import alive, file_clock, machine, temporary_path

BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
"""A claim that was not touched for so long belongs to a process that is gone, or hangs."""
LOOK_SECONDS = 0.5
"""Between two looks at the claims of others, when nothing else is left to do."""
FOLDER = "claims"

U = TypeVar("U")


class Claims:
    """The claims of one process in a folder. A context manager, which releases them.

    `beat` and `stale` are seconds; those of all processes of a folder should be equal.
    """

    def __init__(self, folder: Path, *, beat: float = BEAT_SECONDS, stale: float = STALE_SECONDS) -> None:
        self.folder = folder / FOLDER
        self._beat, self._stale = beat, stale
        self._held: dict[str, str] = {}
        """Name -> the token in the file."""
        self._lock = threading.Lock()
        self._offset = (0.0, 0.0)
        """What the file system's clock is ahead of ours, and until when that is believed."""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._sweep()
        with contextlib.suppress(OSError):  # others may have claims in it
            self.folder.rmdir()

    def take(self, name: str) -> bool:
        """Claim a unit of work; False where a process that is alive has it. Raises CannotWrite."""
        path = self.folder / f"{name}.json"
        for _ in range(2):
            token = secrets.token_hex(8)
            try:
                _make(path, token)
            except FileExistsError:
                if not self._take_over(path):
                    return False
                continue
            except OSError as error:
                raise CannotWrite(f"cannot write {path}: {error.strerror}") from None
            with self._lock:
                self._held[name] = token
            self._start()
            return True
        return False  # somebody was quicker

    def release(self, names: Iterable[str] | None = None) -> None:
        """Give back these claims, or all: what they are about is on the disk, or will not be done here."""
        with self._lock:
            gone = {name: self._held.pop(name) for name in (list(self._held) if names is None else names)}
        for name, token in gone.items():
            path = self.folder / f"{name}.json"
            if _token_of(path)[0] == token:  # else it was taken over meanwhile
                with contextlib.suppress(OSError):
                    path.unlink()

    def turns(
        self, units: Iterable[U], *, name: Callable[[U], str], is_done: Callable[[U], bool]
    ) -> Iterator[U | None]:
        """The units that are not done, each when this process has claimed it; ends when all are done.

        What others have claimed is looked at again later. None is yielded before each pause, when nothing but that is
        left: then what was done here should be written and released, and what others did looked up.
        """
        open_ = deque(units)
        while open_:
            taken = False
            for _ in range(len(open_)):
                unit = open_.popleft()
                if is_done(unit):
                    continue
                if self.take(name(unit)):
                    taken = True
                    yield unit
                else:
                    open_.append(unit)
            if open_ and not taken:
                yield None
                if not any(map(is_done, open_)):
                    self._ended.wait(LOOK_SECONDS)

    def _take_over(self, path: Path) -> bool:
        """Remove the claim of a process that is gone; False where it is alive. Raises CannotWrite."""
        try:
            token, owner = _token_of(path)
            if not self._is_abandoned(path, owner):
                return False
            away = temporary_path(path.parent, "claim")
            os.rename(path, away)
            if _token_of(away)[0] != token:  # of a process that was quicker: it gets its claim back
                with contextlib.suppress(OSError):
                    os.link(away, path)
            away.unlink()
        except FileNotFoundError:  # it was released, or taken over, in this moment
            return True
        except OSError as error:
            raise CannotWrite(f"cannot write {path}: {error.strerror}") from None
        return True

    def _sweep(self) -> None:
        """Remove the claims of processes that are gone, also where what they were about was done before."""
        with contextlib.suppress(CannotWrite):
            for path in list(self.folder.glob("*.json")):
                self._take_over(path)

    def _is_abandoned(self, path: Path, owner: tuple[str, int] | None) -> bool:
        if owner is not None and owner[0] == machine() and not alive(owner[1]):
            return True
        now, (offset, until) = time.time(), self._offset
        if now >= until:
            offset = file_clock(path.parent) - now
            self._offset = offset, now + self._stale / 2
        return now + offset - path.stat().st_mtime > self._stale

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._touch, name="claims", daemon=True)
            self._thread.start()

    def _touch(self) -> None:
        while not self._ended.wait(self._beat):
            with self._lock:
                held = list(self._held)
            for name in held:
                with contextlib.suppress(OSError):
                    os.utime(self.folder / f"{name}.json")


def _make(path: Path, token: str) -> None:
    """Make the file of a claim. Raises FileExistsError, and other OSErrors."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    data = json.dumps({"token": token, "machine": machine(), "process": os.getpid()}).encode()
    try:
        if os.write(descriptor, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(descriptor)


def _token_of(path: Path) -> tuple[str | None, tuple[str, int] | None]:
    """The token in the file of a claim, and the machine and the process that made it; None where it is not whole."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        values = json.loads(path.read_bytes())
        return str(values["token"]), (str(values["machine"]), int(values["process"]))
    return None, None
