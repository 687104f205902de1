"""The options of a run on a cluster, which several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sdcli.errors import UsageError
from sdcli.io.threads import use_threads

if TYPE_CHECKING:
    from sdcli.cluster.ray_engine import ClusterSettings

CLUSTER = "Cluster"

ClusterOpt = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="local|auto|HOST:PORT",
        rich_help_panel=CLUSTER,
        help="Divide the work among worker processes by Ray: on this machine alone, or on the cluster of which this "
        "machine is a node.",
    ),
]
WorkersOpt = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        max=100_000,
        rich_help_panel=CLUSTER,
        show_default="as many as there is room for",
        help="Worker processes of --cluster.",
    ),
]
ThreadsOpt = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        max=1024,
        rich_help_panel=CLUSTER,
        show_default="1 with --cluster, else as many as torch likes",
        help="Threads of torch, in each worker of --cluster or in this process; another number rounds differently.",
    ),
]
GpusOpt = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-worker",
        metavar="NUMBER",
        rich_help_panel=CLUSTER,
        show_default="1",
        help="GPUs of each worker of --cluster; 0.5 lets two workers share one.",
    ),
]


def cluster_settings(
    address: str | None, *, workers: int | None, threads: int | None, gpus: float | None, device: str
) -> ClusterSettings | None:
    """What the options ask for; None without --cluster, and `threads` applies to this process. Raises UsageError."""
    if address is None:
        for name, value in {"--workers": workers, "--gpus-per-worker": gpus}.items():
            if value is not None:
                raise UsageError(f"{name} has no effect without --cluster")
        if threads is not None:
            use_threads(threads)
        return None
    from sdcli.cluster.ray_engine import ClusterSettings

    settings = ClusterSettings(address, workers, threads or 1, gpus, device)
    settings.check()
    return settings


def refuse_with_cluster(**options: object) -> None:
    """Raise UsageError for the first of these options, by their names with _ for -, that was given."""
    for name, value in options.items():
        if value not in (None, False, [], ()):
            raise UsageError(f"--{name.replace('_', '-')} cannot be combined with --cluster: {_REASONS[name]}")


_REASONS = {
    "verify": "one image is verified in this process",
    "dry_run": "nothing is generated; leave --cluster out",
    "trace": "the workers write finished images alone",
    "trace_format": "the workers write finished images alone",
    "heatmap": "the workers write finished images alone",
    "preview": "no images come from the workers to this terminal",
    "show": "no images come from the workers to this terminal",
    "keep_warm": "its workers end with the run",
}
