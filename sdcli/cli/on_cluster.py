"""`sdcli generate --cluster`: the events of a run on a cluster, with their display."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sdcli.cli.ui.cluster_progress import ClusterProgress
from sdcli.cli.ui.console import Console
from sdcli.cli.ui.progress import ProgressBar
from sdcli.cluster.generate_driver import generate
from sdcli.cluster.ray_engine import ClusterSettings
from sdcli.cluster.units import Throughput, Trouble
from sdcli.errors import Stop
from sdcli.generation.events import Event, Result
from sdcli.generation.journal import Journal
from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.generation.settings import OutputSettings, RunSettings


def cluster_events(
    jobs: Sequence[ResolvedJob],
    run: RunSettings,
    output: OutputSettings,
    journal: Journal,
    cluster: ClusterSettings,
    console: Console,
    bar: ProgressBar,
    *,
    begun: tuple[str, int],
    stop: Stop,
) -> Iterator[Event]:
    """One Result for each job, and notes; progress goes to the bar, troubles to stderr."""
    progress = ClusterProgress(bar, console, things="images")
    skipped = 0
    for event in generate(jobs, run, output, journal, cluster, begun=begun, stop=stop):
        match event:
            case Throughput():
                progress.show(event, total=len(jobs) - skipped)
            case Trouble():
                console.warn(event.text)
                console.detail(event.detail.rstrip()) if event.detail else None
            case _:
                skipped += isinstance(event, Result) and event.status == "skipped"
                yield event
    progress.end()
