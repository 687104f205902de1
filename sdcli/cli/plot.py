"""`sdcli plot`: draw the loss curves of training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sdcli.cli.options.shared import JsonOpt, OverwriteOpt, QuietOpt, VerboseOpt
from sdcli.cli.ui.console import Console, printable
from sdcli.errors import UsageError
from sdcli.io.files import check_new, whole_file
from sdcli.training.run_log import Log, read_log

FORMATS = {".png": "png", ".svg": "svg", ".pdf": "pdf"}
LONGEST_NAME = 48
"""Characters of a run's name in the legend."""


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders of the training commands.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="File to write, .png, .svg or .pdf.")
    ] = Path("curves.png"),
    metric: Annotated[str, typer.Option("--metric", help="Logged value in the large panel.")] = "loss",
    smooth: Annotated[
        float, typer.Option("--smooth", min=0, max=0.99999, help="Decay of the moving average per step; 0: off.")
    ] = 0.98,
    log_scale: Annotated[bool, typer.Option("--log-scale", help="Use a logarithmic axis for the metric.")] = False,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Draw the curves of training runs, and print the path of the figure.

    The large panel shows the metric in training (smoothed, and faintly as logged) and in validation; below are
    learning rate, gradient norm and samples/s. Runs may still be training. Steps repeated after a resume count once.
    """
    console = Console(quiet=quiet, verbose=verbose, json=as_json)
    format = FORMATS.get(output.suffix.lower())
    if format is None:
        raise UsageError(f"-o: {output.name!r} should end in {', '.join(FORMATS)}")
    logs = [_read(run, metric, console) for run in runs]
    check_new(output, overwrite=overwrite)

    from sdcli.training.plot import Run, draw_curves, save_figure

    figure = draw_curves(
        [Run(name, log) for name, log in zip(_names(runs), logs, strict=True)],
        metric=metric,
        smooth=smooth,
        log_scale=log_scale,
    )
    with whole_file(output, overwrite=overwrite) as temporary:
        save_figure(figure, temporary, format=format)
    facts = [_facts(run, log, metric) for run, log in zip(runs, logs, strict=True)]
    console.result(output, path=str(output), metric=metric, runs=facts)


def _read(run: Path, metric: str, console: Console) -> Log:
    """The log of a run. Raises UsageError if it lacks the metric."""
    log = read_log(run)
    if log.damaged:
        console.note(f"{run}: skipped {log.damaged} damaged line{'s' if log.damaged > 1 else ''} of the log")
    metrics = sorted({*log.metrics("train"), *log.metrics("validation")})
    if not metrics:
        raise UsageError(f"{run} has logged no steps yet")
    if metric not in metrics:
        raise UsageError(f"{run} has no metric {metric!r}; it has {', '.join(metrics)}")
    return log


def _facts(run: Path, log: Log, metric: str) -> dict[str, Any]:
    """The facts of a run for --json: its last step, and the last and lowest values of the metric."""
    steps = {event: log.series(event, metric) for event in ("train", "validation")}
    facts: dict[str, Any] = {"run": str(run), "step": max((max(at) for at, _ in steps.values() if at), default=0)}
    for event, (at, values) in steps.items():
        finite = [(value, step) for step, value in zip(at, values, strict=True) if abs(value) < float("inf")]
        if finite:
            lowest, step = min(finite)
            facts[event] = {"last": finite[-1][0], "lowest": lowest, "lowest_at": step}
    return facts


def _names(runs: list[Path]) -> list[str]:
    """The legend of each run: the name of its folder, with as many parents as needed to be unique."""
    paths = [run.absolute().parts for run in runs]
    depth = 1
    while depth < max(map(len, paths)) and len({parts[-depth:] for parts in paths}) < len(set(paths)):
        depth += 1
    names = [" ".join(printable("/".join(parts[-depth:])).split()) for parts in paths]
    return [name if len(name) <= LONGEST_NAME else f"...{name[3 - LONGEST_NAME :]}" for name in names]
