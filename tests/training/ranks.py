"""The processes of one run, forked from a server that has imported torch; what each of them does is a function."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.forked import _forking
from tests.training_runs import train_pixels, train_unet

Work = Callable[..., None]
FAILED = 70
"""The exit code of a rank whose work raised an error, which is in RANK.txt."""


def run_ranks(count: int, work: Work, folder: Path, *arguments: Any, timeout: float = 400) -> list[int | None]:
    """Call `work(rank, *arguments)` in `count` processes of one group, with the folder as theirs; their exit codes.

    A rank that does not end in time is killed; its exit code is -9 then.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places: Mapping[str, str] = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        _forking.Process(
            target=_rank, args=(rank, {**os.environ, **places}, str(folder), work, arguments), daemon=False
        )
        for rank in range(count)
    ]
    for rank in ranks:
        rank.start()
    end = time.monotonic() + timeout
    for rank in ranks:
        rank.join(max(0.0, end - time.monotonic()))
    for rank in ranks:
        if rank.exitcode is None:
            rank.kill()
            rank.join()
    return [rank.exitcode for rank in ranks]


def together(count: int, work: Work, folder: Path, *arguments: Any) -> None:
    """The same, where every rank must succeed."""
    codes = run_ranks(count, work, folder, *arguments)
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("rank-*.txt")))
    assert codes == [0] * count, f"{codes}\n{errors}"


def training(rank: int, data: str, run: str, changes: dict[str, Any]) -> None:
    """`sdcli train-unet` in a rank; in pixel space on `grey_images`, which takes a fraction of a second."""
    train = train_pixels if (Path(data).parent / "micro.json").is_file() else train_unet
    train(Path(data), Path(run), **changes)


def _rank(rank: int, environment: dict[str, str], folder: str, work: Work, arguments: tuple[Any, ...]) -> None:
    import faulthandler
    import traceback

    import torch

    os.chdir(folder)
    os.environ.clear()
    os.environ.update({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    os.environ["LOCAL_WORLD_SIZE"] = environment["WORLD_SIZE"]
    torch.set_num_threads(1)
    try:
        work(rank, *arguments)
    except BaseException as error:
        Path(f"rank-{rank}.txt").write_text(f"rank {rank}\n" + "".join(traceback.format_exception(error)))
        faulthandler.disable()
        os._exit(getattr(error, "exit_code", FAILED))
