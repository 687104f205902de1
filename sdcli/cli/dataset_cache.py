"""`sdcli dataset cache`: encode images and captions before training."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdcli.cli.cache_runs import CacheOutcome, CacheRun, fill_here, fill_on_workers
from sdcli.cli.dataset import (
    CaptionColumnOpt,
    CaptionExtensionOpt,
    DataArg,
    ImageColumnOpt,
    SplitOpt,
)
from sdcli.cli.options.cluster import ClusterOpt, GpusOpt, ThreadsOpt, cluster_settings
from sdcli.cli.options.sharding import check_divided
from sdcli.cli.options.shared import (
    DeviceOpt,
    DTypeOpt,
    JsonOpt,
    ModelOpt,
    ModelsFileOpt,
    OfflineOpt,
    QuietOpt,
    ShardOpt,
    VerboseOpt,
)
from sdcli.cli.ui.console import Console
from sdcli.cli.ui.signals import GracefulStop
from sdcli.errors import SomeFailed, UsageError, raise_for
from sdcli.generation.run_shard import RunShard
from sdcli.generation.settings import RunSettings
from sdcli.io.files import refuse_inside
from sdcli.models.registry import ModelSpec, load_registry
from sdcli.training.config_files import settings_from
from sdcli.training.settings import ImageSettings, cache_folder

if TYPE_CHECKING:
    from sdcli.cli.ui.training_progress import TrainingProgress
    from sdcli.data.cache.progress import CacheProgress
    from sdcli.training.events import Event
    from sdcli.training.inputs.image_data import ImageData

DATA, SHAPE, RUN = "Data", "Images", "The run"
SHOWN = 10
"""Dropped images that are listed on the terminal; --json lists all."""


def command(
    data: DataArg,
    model: ModelOpt = None,
    resolution: Annotated[
        str | None,
        typer.Option(
            "--resolution",
            metavar="N|WxH",
            rich_help_panel=SHAPE,
            show_default="the model's own",
            help="Size in pixels.",
        ),
    ] = None,
    random_flip: Annotated[
        bool, typer.Option("--random-flip", rich_help_panel=SHAPE, help="Also encode mirrored images.")
    ] = False,
    enable_bucket: Annotated[
        bool,
        typer.Option("--enable-bucket", rich_help_panel=SHAPE, help="Group images by aspect ratio."),
    ] = False,
    bucket_reso_steps: Annotated[
        int | None,
        typer.Option(
            "--bucket-reso-steps",
            min=8,
            rich_help_panel=SHAPE,
            metavar="PIXELS",
            show_default="1/8 of the resolution",
            help="Step between the sides of buckets.",
        ),
    ] = None,
    min_bucket_reso: Annotated[
        int | None,
        typer.Option(
            "--min-bucket-reso",
            metavar="PIXELS",
            min=8,
            rich_help_panel=SHAPE,
            show_default="1/2 of the resolution",
            help="Minimum side of a bucket.",
        ),
    ] = None,
    max_bucket_reso: Annotated[
        int | None,
        typer.Option(
            "--max-bucket-reso",
            metavar="PIXELS",
            min=8,
            rich_help_panel=SHAPE,
            show_default="twice the resolution",
            help="Maximum side of a bucket.",
        ),
    ] = None,
    train_batch_size: Annotated[
        int | None,
        typer.Option(
            "--train-batch-size",
            min=1,
            rich_help_panel=SHAPE,
            show_default="16, as in training",
            help="Samples of a training step, by which buckets that are too small are merged.",
        ),
    ] = None,
    caption_prefix: Annotated[
        str, typer.Option("--caption-prefix", rich_help_panel=DATA, help="Text put before every caption.")
    ] = "",
    prompt_template: Annotated[
        str | None,
        typer.Option(
            "--prompt-template",
            rich_help_panel=DATA,
            show_default="the model's own",
            help="Template around captions: '{prompt}, in oil'.",
        ),
    ] = None,
    split: SplitOpt = "train",
    image_column: ImageColumnOpt = None,
    caption_column: CaptionColumnOpt = None,
    caption_extension: CaptionExtensionOpt = ".txt",
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            "--cache-dir",
            metavar="DIR",
            rich_help_panel=RUN,
            show_default="in your cache folder",
            help="Folder of the cache.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            max=256,
            rich_help_panel=RUN,
            show_default="1 on the CPU, else 8",
            help="Images to encode at once.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            max=100_000,
            rich_help_panel=RUN,
            help="Threads that read images; with --cluster the worker processes.",
            show_default="one per CPU",
        ),
    ] = None,
    device: DeviceOpt = "auto",
    dtype: DTypeOpt = "auto",
    shard: ShardOpt = None,
    cluster: ClusterOpt = None,
    threads: ThreadsOpt = None,
    gpus_per_worker: GpusOpt = None,
    models_file: ModelsFileOpt = None,
    offline: OfflineOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Encode images and captions once, and keep latents and text states for training.

    Records are found by a digest of the image, its size, the VAE and the number format: training with the same settings
    reads all of them, and a new image costs one encoding. An interrupted run can be repeated, and runs at the same time
    divide the work. --dtype auto is what training with --mixed-precision auto reads: bfloat16 on CPUs with instructions
    for it, else float32. For training on a CPU with --mixed-precision bf16 or no, use bfloat16 or float32.
    """
    console = Console(quiet=quiet, verbose=verbose, json=as_json)
    typed = {
        "resolution": resolution,
        "random_flip": random_flip,
        "enable_bucket": enable_bucket,
        "bucket_reso_steps": bucket_reso_steps,
        "min_bucket_reso": min_bucket_reso,
        "max_bucket_reso": max_bucket_reso,
        "train_batch_size": train_batch_size,
        "split": split,
        "image_column": image_column,
        "caption_column": caption_column,
        "caption_extension": caption_extension,
        "cache_dir": cache_dir,
    }
    settings = settings_from(ImageSettings, {name: value for name, value in typed.items() if value is not None})
    part = None if shard is None else RunShard.of(shard)
    of_cluster = workers if cluster is not None else None
    nodes = cluster_settings(cluster, workers=of_cluster, threads=threads, gpus=gpus_per_worker, device=device)
    check_divided(shard, cluster, None)
    spec = load_registry(models_file).find(model)
    if spec.kind.space != "latent":
        raise UsageError(f"{spec.name} works on pixels, without a VAE, so there are no latents to cache")
    stop = GracefulStop(console, unit="the batch in hand", kept="what was encoded is kept").install()

    from sdcli.cli.ui.training_progress import TrainingProgress

    folder = cache_folder(settings.cache_dir)
    refuse_inside(folder, data, choose="another --cache-dir")
    with TrainingProgress(console) as display:
        found = _opened(data, settings, spec, display)
        if found.images.kind != "pictures":
            raise UsageError(f"{data} holds latents already; training reads them as they are")
        run = RunSettings(device=device, dtype=dtype, batch_size=batch_size, offline=offline)
        template = prompt_template if prompt_template is not None else spec.defaults.prompt_template
        what = CacheRun(data, found, settings, spec, run, folder, caption_prefix, template)
        if nodes is None:
            outcome = fill_here(what, display, console, part=part, workers=workers, stop=stop)
    if nodes is not None:
        outcome = fill_on_workers(what, nodes, console, stop=stop)
    _report(console, folder, found, outcome, part)
    raise_for(outcome.errors, of=outcome.pictures.total + (outcome.texts.total if outcome.texts is not None else 0))


def _opened(data: str, settings: ImageSettings, spec: ModelSpec, display: TrainingProgress) -> ImageData:
    """The images as training would read them."""
    from sdcli.training.inputs.image_data import examine_data, list_data, merge_buckets

    resolution = settings.target_size((spec.defaults.width, spec.defaults.height))
    images = list_data(data, settings)
    opening = examine_data(data, images, settings, resolution=resolution, size_step=spec.kind.size_step, captions=False)
    found = _reported(opening, display)
    return _reported(merge_buckets(found, settings.train_batch_size), display) if settings.enable_bucket else found


def _reported(events: Generator[Event, None, ImageData], display: TrainingProgress) -> ImageData:
    """Show the events of a generator, warnings with -q, too; its value."""
    while True:
        try:
            display.report(next(events))
        except StopIteration as ended:
            found: ImageData = ended.value
            return found


def _report(console: Console, folder: Path, found: ImageData, outcome: CacheOutcome, part: RunShard | None) -> None:
    """Print the figures. Raises SomeFailed if images were dropped; those that cannot be used are of the first shard."""
    of_pictures, of_texts, late = outcome.pictures, outcome.texts, outcome.dropped
    for one in late[:SHOWN]:
        console.warn(f"{one.name} is dropped: {one.reason}")
    if len(late) > SHOWN:
        console.warn(f"and {len(late) - SHOWN:,} more; --json lists all")
    unusable = found.dropped if part is None or part.index == 1 else 0
    dropped = unusable + len(late)
    rows = {"latents": _row(of_pictures), **({"texts": _row(of_texts)} if of_texts is not None else {})}
    size = sum(entry.stat().st_size for name in rows for entry in _entries(folder / name))
    console.result(
        _line("pictures", of_pictures),
        cache_dir=os.fspath(folder),
        cache_bytes=size,
        pictures=of_pictures.total - len(late),
        dropped=dropped,
        not_encoded=[{"name": one.name, "reason": one.reason} for one in late],
        **rows,
    )
    if not console.json:
        if of_texts is not None:
            console.result(_line("texts", of_texts))
        console.note(f"the cache in {folder} has {size / 1e6:,.1f} MB")
    if dropped:
        total = of_pictures.total + unusable
        raise SomeFailed(f"{dropped:,} of {total:,} images were dropped; the others are in the cache")


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    return [entry for entry in os.scandir(folder) if entry.is_file()] if folder.is_dir() else []


def _row(progress: CacheProgress) -> dict[str, Any]:
    return {
        "total": progress.total,
        "encoded": progress.encoded,
        "reused": progress.reused,
        "dropped": progress.dropped,
        "seconds": round(progress.seconds, 3),
        "per_second": round(_speed(progress), 3),
        "waiting_share": round(_waiting(progress), 4),
    }


def _line(what: str, progress: CacheProgress) -> str:
    counts = f"{what}: {progress.encoded:,} encoded, {progress.reused:,} reused"
    counts += f", {progress.dropped:,} dropped" if what == "pictures" else ""
    if not progress.encoded:
        return counts
    waiting = f", {100 * _waiting(progress):.0f} % of the time spent waiting for data" if what == "pictures" else ""
    return f"{counts}; {_speed(progress):.1f} {what}/s{waiting}"


def _speed(progress: CacheProgress) -> float:
    return progress.encoded / progress.seconds if progress.seconds else 0.0


def _waiting(progress: CacheProgress) -> float:
    return progress.waiting / progress.seconds if progress.seconds else 0.0
