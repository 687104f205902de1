"""The results of a run on a cluster, while its progress and its troubles are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from sdcli.cli.ui.cluster_progress import ClusterProgress
from sdcli.cli.ui.console import Console
from sdcli.cli.ui.progress import ProgressBar
from sdcli.cluster.units import Throughput, Trouble

R = TypeVar("R")


def results_of_cluster(
    events: Iterable[R | Trouble | Throughput], console: Console, *, total: int, things: str
) -> Iterator[R]:
    """The events that are results, of `total` items called `things`; the others go to stderr."""
    with ProgressBar(console) as bar:
        yield from with_progress(events, bar, console, total=lambda: total, things=things)


def with_progress(
    events: Iterable[R | Trouble | Throughput],
    bar: ProgressBar,
    console: Console,
    *,
    total: Callable[[], int],
    things: str,
) -> Iterator[R]:
    """The same with a bar that exists; `total` is asked whenever progress is shown."""
    progress = ClusterProgress(bar, console, things=things)
    for event in events:
        match event:
            case Throughput():
                progress.show(event, total=total())
            case Trouble():
                console.warn(event.text)
                console.detail(event.detail.rstrip()) if event.detail else None
            case _:
                yield event
    progress.end()
