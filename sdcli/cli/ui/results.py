"""The results of `sdcli generate`: a line on stdout per image, a sentence on stderr per failure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdcli.cli.ui.console import Console
from sdcli.errors import SdcliError
from sdcli.generation.resolve.jobs import BadJob, ResolvedJob

if TYPE_CHECKING:
    from sdcli.generation.events import Result


def report(result: Result, console: Console) -> None:
    """Print a result: its path, or with --json an object."""
    seconds = result.seconds
    rest = {"path": str(result.path), "seconds": round(seconds, 3), "fallbacks": list(result.fallbacks)}
    rest |= {"beside": [str(path) for path in result.side_files]} if result.side_files else {}
    if result.status == "skipped":
        console.detail(f"{result.path} is already finished")
    if result.status == "done" or console.json:
        console.result(result.path or "", **_fields(result.job, result.status), **rest)
    if result.status == "done":
        console.detail(f"seed {result.job.request.seed}, {seconds:.1f} s")
        if result.side_files and not console.json:
            console.note(f"also written: {', '.join(str(path) for path in result.side_files)}")


def report_failure(
    job: ResolvedJob | BadJob, error: SdcliError, console: Console, *, alone: bool, status: str = "failed"
) -> None:
    """Print a failure on stderr, unless the job is `alone`: its error ends the process. With --json print an object."""
    if console.json:
        console.result("", **_fields(job, status), error=str(error), exit_code=error.exit_code)
    if not alone:
        console.warn(f"image {job.index}: {error}")


def _fields(job: ResolvedJob | BadJob, status: str) -> dict[str, Any]:
    """Fields of a --json line of any job."""
    fields: dict[str, Any] = {"status": status, "index": job.index}
    fields |= {"custom_id": job.custom_id} if job.custom_id is not None else {}
    fields |= {"line": job.line} if job.line is not None else {}
    if isinstance(job, ResolvedJob):
        r = job.request
        width, height = r.final_size
        fields |= {"seed": r.seed, "width": width, "height": height, "steps": r.steps, "model": r.model}
    return fields
