"""The contact sheet of a sweep: the images of all combinations in order, with a gap for each that failed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sdcli.cli.ui.console import Console
from sdcli.generation.resolve.jobs import BadJob, ResolvedJob
from sdcli.generation.settings import OutputSettings
from sdcli.images.sheet_labels import labels_of
from sdcli.io.files import AlreadyExists, numbered
from sdcli.request.sweep import Axis

LABEL_LINES = 4


@dataclass(frozen=True)
class SweepSheet:
    """The jobs in the cells of the sheet, row by row."""

    places: tuple[ResolvedJob | BadJob, ...]
    columns: int

    @classmethod
    def of(cls, jobs: Sequence[ResolvedJob | BadJob], axes: Sequence[Axis], *, num_images: int) -> SweepSheet:
        """A sheet with the values of the last axis side by side; a refused combination leaves its cells empty."""
        places = (job for job in jobs for _ in range(num_images if isinstance(job, BadJob) else 1))
        return cls(tuple(places), len(axes[-1].values) * num_images)

    def check(self) -> None:
        """Raise UsageError if the sheet would be too large."""
        from sdcli.images.contact_sheet import check_size

        widths, heights = zip(
            *(place.request.final_size for place in self.places if isinstance(place, ResolvedJob)), strict=True
        )
        check_size(len(self.places), (max(widths), max(heights)), label_lines=LABEL_LINES)

    def write(self, paths: Mapping[int, Path], settings: OutputSettings, console: Console) -> None:
        """Write the sheet of the images, given by job index, and print its path."""
        from sdcli.images.contact_sheet import about_labels, contact_sheet, empty, write_sheet
        from sdcli.images.image_files import open_image

        files = [paths.get(place.index) for place in self.places]
        requests = [place.request if isinstance(place, ResolvedJob) else None for place in self.places]
        labels = labels_of([str(file or "failed") for file in files], requests)
        images = [open_image(file) if file is not None else empty((1, 1)) for file in files]
        sheet = contact_sheet(images, columns=self.columns, labels=labels, label_lines=LABEL_LINES)
        on_it = [
            {"name": str(file or ""), "request": request.typed() if request and settings.metadata else None}
            for file, request in zip(files, requests, strict=True)
        ]
        for number in itertools.count(1):
            path = settings.outdir / numbered(PurePosixPath("sweep.png"), number)
            if path in paths.values():
                continue
            try:
                beside = write_sheet(path, sheet, {"pictures": on_it}, overwrite=settings.overwrite)
            except AlreadyExists:
                continue
            if beside:
                console.warn(about_labels(beside))
            console.result(path, status="sheet", path=str(path), width=sheet.width, height=sheet.height)
            return
