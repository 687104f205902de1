"""Faults of the disk for tests: every I/O call can fail or be the last, and unsynced writes can be lost.

`watched` sees each call that changes something below a folder, before and after it is done. `failing` and `dying` are
its usual reactions; `PowerLoss` follows the calls in a model of a disk and tells what a power failure may leave.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from sdcli.io.temporary_files import temporary_path

DIED = 77
"""Exit status of a process that died at the chosen call."""
MAKING = {"open", "write", "close", "fsync", "mkdir", "symlink", "link", "save_file", "sendfile"}
"""The calls that a full disk refuses; renaming and deleting go on working there."""
WRITING = {"write", "save_file"}
"""The calls that can be half done."""


@dataclass(frozen=True)
class Call:
    """One call that changes the disk."""

    kind: str
    path: Path
    other: Path | None = None
    """The new name of a rename, the second of an exchange."""
    target: str = ""
    """Where a symbolic link leads."""
    half: Callable[[], None] = field(default=lambda: None, compare=False)
    """Do half of it, for what writes data."""

    def __str__(self) -> str:
        return f"{self.kind} {self.path.name}"


Hook = Callable[[int, Call], None]


def temporary_of(process: int, folder: Path) -> Path:
    """A temporary name as another process of this machine would choose it."""
    path = temporary_path(folder)
    return path.with_name(path.name.replace(f"-{os.getpid()}-", f"-{process}-"))


def nothing(index: int, call: Call) -> None:
    """The hook that does nothing."""


def error_of(call: Call, number: int) -> Exception:
    """What such a call fails with; safetensors has a class of its own for it."""
    if call.kind == "save_file":
        return SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
    return OSError(number, os.strerror(number), str(call.path))


def failing(at: int, *, number: int = errno.EIO, half: bool = False) -> Hook:
    """The call of that index fails; with `half` it has done half of its work by then."""

    def hook(index: int, call: Call) -> None:
        if index == at:
            if half:
                call.half()
            raise error_of(call, number)

    return hook


def full_from(at: int) -> Hook:
    """From that call on the disk takes nothing more."""

    def hook(index: int, call: Call) -> None:
        if index >= at and call.kind in MAKING:
            call.half()
            raise error_of(call, errno.ENOSPC)

    return hook


def dying(at: int, *, half: bool = False) -> Hook:
    """The process ends at that call, as by kill -9."""

    def hook(index: int, call: Call) -> None:
        if index == at:
            if half:
                call.half()
            os._exit(DIED)

    return hook


def in_a_child(run: Callable[[], object]) -> int:
    """Run in a forked process; 0 when it ended well, `DIED`, or 1 after an exception (printed)."""
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextlib.contextmanager
def watched(
    root: Path,
    *,
    before: Hook = nothing,
    after: Hook = nothing,
    sync: bool = True,
    also: Sequence[tuple[Any, str]] = (),
) -> Iterator[list[Call]]:
    """Patch Python's I/O so that each call below `root` is told to `before` and `after`, with its index from 0.

    Without `sync` nothing is really fsynced, which is quicker and makes no difference to a process that dies. `also`
    names functions (module, name) of two paths that are calls of their own. Yields the list of calls so far.
    """
    calls: list[Call] = []
    root = Path(os.path.realpath(root))
    real = {name: getattr(os, name) for name in (*_ONE_PATH, *_TWO_PATHS, *_OTHERS) if hasattr(os, name)}
    real_open, real_save = io.open, safetensors.torch.save_file
    busy = False

    def place(path: Any, dir_fd: int | None = None) -> Path:
        if isinstance(path, int):
            return Path(os.readlink(f"/proc/self/fd/{path}"))
        path = os.fsdecode(path)
        base = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
        return Path(os.path.normpath(os.path.join(base, path)))

    def told(call: Call, do: Callable[[], Any]) -> Any:
        nonlocal busy
        if busy or not call.path.is_relative_to(root):
            return do()
        index = len(calls)
        calls.append(call)
        before_was, busy = busy, True  # what the hooks do themselves is not watched
        try:
            before(index, call)
        finally:
            busy = before_was
        result = do()
        busy = True
        try:
            after(index, call)
        finally:
            busy = before_was
        return result

    def one_path(kind: str) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, dir_fd: int | None = None, **options: Any) -> Any:
            given = {**options, **({"dir_fd": dir_fd} if dir_fd is not None else {})}
            return told(Call(kind, place(path, dir_fd)), lambda: real[kind](path, *arguments, **given))

        return call

    def two_paths(kind: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def call(one: Any, other: Any, **options: Any) -> Any:
            return told(Call(kind, place(one), place(other)), lambda: do(one, other, **options))

        return call

    def symlink(target: Any, path: Any, **options: Any) -> Any:
        made = Call("symlink", place(path), target=os.fsdecode(target))
        return told(made, lambda: real["symlink"](target, path, **options))

    def fsync(descriptor: int) -> Any:
        return told(Call("fsync", place(descriptor)), lambda: real["fsync"](descriptor) if sync else None)

    def write(descriptor: int, data: Any) -> Any:
        path = place(descriptor)
        half = lambda: real["write"](descriptor, bytes(data)[: len(data) // 2])  # noqa: E731
        return told(Call("write", path, half=half), lambda: real["write"](descriptor, data))

    def sendfile(out: int, source: int, *arguments: Any, **options: Any) -> Any:
        return told(Call("sendfile", place(out)), lambda: real["sendfile"](out, source, *arguments, **options))

    def os_open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        do = lambda: real["open"](path, flags, mode, dir_fd=dir_fd)  # noqa: E731
        writing = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return told(Call("open", place(path, dir_fd)), do) if writing else do()  # type: ignore[no-any-return]

    def open_file(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+"):
            return real_open(file, mode, *arguments, **options)
        path = place(file)
        opened = told(Call("open", path), lambda: real_open(file, mode, *arguments, **options))
        return _File(opened, path, told)

    def save_file(tensors: Any, filename: Any, metadata: Any = None) -> None:
        def half() -> None:
            real_save(tensors, filename, metadata)
            os.truncate(filename, os.path.getsize(filename) // 2)

        told(Call("save_file", place(filename), half=half), lambda: real_save(tensors, filename, metadata))

    patches: list[tuple[Any, str, Any]] = [(os, name, one_path(name)) for name in _ONE_PATH]
    patches += [(os, name, two_paths(name, real[name])) for name in _TWO_PATHS]
    patches += [(os, "symlink", symlink), (os, "fsync", fsync), (os, "write", write), (os, "open", os_open)]
    patches += [(io, "open", open_file), (builtins, "open", open_file), (safetensors.torch, "save_file", save_file)]
    patches += [(os, "sendfile", sendfile)] if "sendfile" in real else []
    patches += [(module, name, two_paths(name, getattr(module, name))) for module, name in also]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    try:
        for owner, name, patch in patches:
            setattr(owner, name, patch)
        yield calls
    finally:
        for owner, name, original in reversed(originals):
            setattr(owner, name, original)


_ONE_PATH = ("chmod", "mkdir", "remove", "rmdir", "truncate", "unlink")
_TWO_PATHS = ("link", "rename", "replace")
_OTHERS = ("fsync", "open", "sendfile", "symlink", "write")


class _File:
    """An open file whose writes and whose closing are calls."""

    def __init__(self, file: Any, path: Path, told: Callable[[Call, Callable[[], Any]], Any]) -> None:
        self._file, self._path, self._told = file, path, told

    def write(self, data: Any) -> Any:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        def do() -> Any:
            count = self._file.write(data)
            self._file.flush()  # so that what is watched after it is on the disk
            return count

        return self._told(Call("write", self._path, half=half), do)

    def close(self) -> None:
        if not self._file.closed:
            try:
                self._told(Call("close", self._path), lambda: None)
            finally:
                self._file.close()

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


# What a power failure leaves

Tree = dict[str, Any]
"""A folder: name -> bytes of a file, target (str) of a link, Tree of a folder."""


@dataclass
class _Data:
    now: bytes = b""
    durable: bytes = b""


@dataclass
class _Link:
    target: str


@dataclass
class _Folder:
    now: dict[str, Any] = field(default_factory=dict)
    durable: dict[str, Any] = field(default_factory=dict)
    pending: list[dict[str, Any]] = field(default_factory=list)
    """Changes since the last fsync, each whole or not at all: name -> what is there afterwards, or None."""

    def set(self, names: dict[str, Any]) -> None:
        self.pending.append(names)
        _apply(self.now, names)


def _apply(folder: dict[str, Any], names: dict[str, Any]) -> None:
    for name, node in names.items():
        folder.pop(name, None)
        if node is not None:
            folder[name] = node


class PowerLoss:
    """A disk that keeps only what was fsynced for certain (ALICE, Pillai et al. 2014).

    `follow` is the `after` hook of `watched`. What may be there after a power failure at this moment: of each file
    what was last synced, the first half of the rest, or all; of each folder any of the changes of its names since its
    last fsync, in any combination, each whole. `states` holds each different outcome once, with how it came about.
    """

    def __init__(self, root: Path, *, luck: int = 6) -> None:
        self.root, self.luck = Path(os.path.realpath(root)), luck
        self.disk = _loaded(self.root)
        self.states: dict[str, tuple[Tree, str]] = {}
        self.collect(-1, "at the start")

    def follow(self, index: int, call: Call) -> None:
        folder = self._node(call.path.parent) if call.path != self.root else _Folder(now={call.path.name: self.disk})
        name = call.path.name
        match call.kind:
            case "open":
                if name not in folder.now:
                    folder.set({name: _Data()})
                folder.now[name].now = call.path.read_bytes()
            case "write" | "close" | "sendfile" | "truncate":
                folder.now[name].now = call.path.read_bytes()
            case "save_file":  # it renames a temporary file of its own
                folder.set({name: _Data(call.path.read_bytes())})
            case "fsync":
                node = folder.now[name]
                if isinstance(node, _Folder):
                    node.durable, node.pending = dict(node.now), []
                else:
                    node.durable = node.now
            case "rename" | "replace":
                assert call.other is not None
                assert call.other.parent == call.path.parent, "the model knows renames inside one folder"
                folder.set({name: None, call.other.name: folder.now[name]})
            case "exchange":
                assert call.other is not None
                folder.set({name: folder.now[call.other.name], call.other.name: folder.now[name]})
            case "link":
                assert call.other is not None
                self._node(call.other.parent).set({call.other.name: folder.now[name]})
            case "symlink":
                folder.set({name: _Link(call.target)})
            case "mkdir":
                folder.set({name: _Folder()})
            case "unlink" | "remove" | "rmdir":
                folder.set({name: None})
            case "chmod":
                pass
            case kind:
                raise AssertionError(f"the model does not know {kind}")
        self.collect(index, f"after call {index}, {call}")

    def collect(self, index: int, moment: str) -> None:
        """Add what a power failure at this moment may leave."""
        for lost in (*_DATA, "all that is unsynced"):
            self._add(_left(self.disk, lost, random.Random(0)), f"{moment}, losing {lost}")
        for number in range(self.luck):
            lottery = random.Random(f"{index} {number}")
            self._add(_left(self.disk, "by chance", lottery), f"{moment}, losing by chance ({number})")

    def certain(self) -> Tree:
        """What is there however little survives."""
        return _left(self.disk, "all that is unsynced", random.Random(0))

    def _add(self, tree: Tree, how: str) -> None:
        self.states.setdefault(repr(_sorted(tree)), (tree, how))

    def _node(self, path: Path) -> Any:
        node: Any = self.disk
        for name in path.relative_to(self.root).parts:
            node = node.now[name]
        return node


def materialize(tree: Tree, folder: Path) -> None:
    """Make the folder of a state."""
    folder.mkdir(parents=True)
    for name, node in tree.items():
        if isinstance(node, dict):
            materialize(node, folder / name)
        elif isinstance(node, str):
            (folder / name).symlink_to(node)
        else:
            (folder / name).write_bytes(node)


def _loaded(path: Path) -> _Folder:
    """A folder that is on the disk for certain."""
    folder = _Folder()
    for entry in os.scandir(path):
        if entry.is_symlink():
            folder.now[entry.name] = _Link(os.readlink(entry.path))
        elif entry.is_dir():
            folder.now[entry.name] = _loaded(Path(entry.path))
        else:
            data = Path(entry.path).read_bytes()
            folder.now[entry.name] = _Data(data, data)
    folder.durable = dict(folder.now)
    return folder


_DATA = {
    "unsynced data": 0.0,
    "half of the unsynced data": 0.5,
    "nothing": 1.0,
    "all but the last change of names": 1.0,
}
"""What may be lost, and how much of a file's unsynced data is left then."""


def _left(folder: _Folder, lost: str, lottery: random.Random) -> Tree:
    names = dict(folder.durable)
    for number, change in enumerate(folder.pending, start=1):
        if {
            "all that is unsynced": False,
            "all but the last change of names": number == len(folder.pending),
            "by chance": lottery.random() < 0.5,
        }.get(lost, True):
            _apply(names, change)
    tree: Tree = {}
    for name, node in names.items():
        if isinstance(node, _Folder):
            tree[name] = _left(node, lost, lottery)
        elif isinstance(node, _Link):
            tree[name] = node.target
        else:
            share = lottery.choice([0.0, 0.5, 1.0]) if lost == "by chance" else _DATA.get(lost, 0.0)
            more = len(node.now) - len(node.durable)
            tree[name] = node.now if share == 1 else node.durable + node.now[len(node.durable) :][: int(more * share)]
    return tree


def _sorted(tree: Tree) -> list[Any]:
    return [(name, _sorted(node) if isinstance(node, dict) else node) for name, node in sorted(tree.items())]
