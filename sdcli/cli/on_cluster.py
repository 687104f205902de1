"""`sdcli generate --cluster`: the events of a run on a cluster, with their display."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sdcli.cli.cluster_results import with_progress
from sdcli.cli.ui.console import Console
from sdcli.cli.ui.progress import ProgressBar
from sdcli.cluster.generate_driver import generate
from sdcli.cluster.ray_engine import ClusterSettings
from sdcli.errors import Stop
from sdcli.generation.events import Event, Note, Result
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
    skipped = 0

    def of_workers() -> int:
        return len(jobs) - skipped

    events = generate(jobs, run, output, journal, cluster, begun=begun, stop=stop)
    shown: Iterator[Result | Note] = with_progress(events, bar, console, total=of_workers, things="images")
    for event in shown:
        skipped += isinstance(event, Result) and event.status == "skipped"
        yield event
