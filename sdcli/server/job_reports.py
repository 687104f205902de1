"""What the reports about a job make of it: its events, its progress, its images and its failures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from sdcli.server.jobs import Job
from sdcli.server.metrics import Metrics
from sdcli.server.protocol import FailureKind, Happened, ImageDone, ImageFailed, Partial, PreviewImage, Report


def enter_report(job: Job, report: Report, metrics: Metrics) -> None:
    """Enter a worker's report into a job that is not over; about an image that is done or failed nothing is entered."""
    match report:
        case Happened(event=event):
            job.add(_of_whole_job(job, event) if event["type"] == "step" else event)
        case PreviewImage():
            job.preview = job.previews[report.image] = report
            job.add({"type": "preview", "image": report.image, "step": report.step, "bytes": len(report.data)})
        case Partial():
            job.partials.append(report)
            number = len(job.partials) - 1
            job.add({"type": "partial", "image": report.image, "step": report.step, "number": number})
        case ImageDone() if report.image in job.left:
            job.done[report.image] = report
            job.previews.pop(report.image, None)
            metrics.images.inc()
            job.progress = max(job.progress, (len(job.done) + len(job.failed)) / len(job.images))
            job.add({"type": "image", "image": report.image, "seconds": report.seconds})
        case ImageFailed() if report.image in job.left:
            if job.late and report.kind == "cancelled":
                report = replace(report, kind="timeout", sentence=f"took longer than {job.timeout:g} s")
            _enter_failure(job, report, metrics)


def fail(job: Job, images: Iterable[int], kind: FailureKind, sentence: str, metrics: Metrics) -> None:
    """Let images of a job fail."""
    for image in sorted(images):
        _enter_failure(job, ImageFailed(job.id, image, kind, sentence), metrics)


def _enter_failure(job: Job, failure: ImageFailed, metrics: Metrics) -> None:
    job.failed[failure.image] = failure
    metrics.failed(failure.kind)
    job.add({"type": "failed", "image": failure.image, "kind": failure.kind, "error": failure.sentence})


def _of_whole_job(job: Job, event: dict[str, Any]) -> dict[str, Any]:
    """The event of a step, with the progress and the time left of the whole job instead of the batch."""
    fraction, of_batch, together = event["fraction"], event["seconds_left"], len(event["images"])
    over = len(job.done) + len(job.failed)
    share = (over + together * fraction) / len(job.images)
    job.progress = max(job.progress, min(1.0, share))
    batches_left = max(0, len(job.images) - over - together) / together
    of_others = batches_left * of_batch / (1 - fraction) if fraction < 1 else 0.0
    job.seconds_left = round(of_batch + of_others, 1)
    return {**event, "progress": round(job.progress, 4), "seconds_left": job.seconds_left}
