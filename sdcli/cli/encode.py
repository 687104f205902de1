"""`sdcli encode`: encode images to latent files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sdcli.cli.options.cluster import ClusterOpt, GpusOpt, ThreadsOpt, WorkersOpt, cluster_settings
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
from sdcli.errors import SdcliError, Stop, UsageError, raise_for
from sdcli.generation.run_shard import WHOLE, RunShard
from sdcli.generation.settings import RunSettings
from sdcli.images.formats import IMAGE_SUFFIXES, UNREAD_SUFFIXES
from sdcli.models.registry import ModelSpec, load_registry
from sdcli.request.input_files import InputFile, input_files
from sdcli.request.schema import parse_size

if TYPE_CHECKING:
    from sdcli.cluster.ray_engine import ClusterSettings
    from sdcli.generation.encode_plan import EncodeResult, EncodeSettings

INPUT, OUTPUT, RUN = "Images", "Output", "The run"


def command(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE_OR_FOLDER", readable=False, help="Images, or folders of images.")
    ],
    model: ModelOpt = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="WxH",
            rich_help_panel=INPUT,
            help="Resize every image to this width and height in pixels, multiples of 8.",
            show_default="the image's own size, cropped to multiples of 8",
        ),
    ] = None,
    fit: Annotated[
        Literal["crop", "pad", "stretch"] | None,
        typer.Option(
            "--fit",
            rich_help_panel=INPUT,
            help="How an image of another aspect ratio is brought to --size; pad adds black borders.",
            show_default="crop",
        ),
    ] = None,
    sample: Annotated[
        bool,
        typer.Option(
            "--sample", rich_help_panel=INPUT, help="Sample from the VAE's distribution instead of taking its mean."
        ),
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, max=2**63 - 1, rich_help_panel=INPUT, help="Seed of --sample.", show_default="0"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            rich_help_panel=OUTPUT,
            help="File to write, for a single image or --pack.",
        ),
    ] = None,
    outdir: Annotated[
        Path | None,
        typer.Option(
            "--outdir", metavar="DIR", rich_help_panel=OUTPUT, show_default="latents", help="Folder for the latents."
        ),
    ] = None,
    pack: Annotated[
        bool,
        typer.Option(
            "--pack",
            rich_help_panel=OUTPUT,
            help="Write one file per 16 images (or per --batch-size) instead of one per image.",
        ),
    ] = False,
    half: Annotated[
        bool, typer.Option("--half", rich_help_panel=OUTPUT, help="Store 16-bit instead of 32-bit numbers.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", rich_help_panel=OUTPUT, help="Replace existing files of other images or settings."),
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", rich_help_panel=OUTPUT, help="Decode again, and print the PSNR to the original in dB."),
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", min=1, max=256, rich_help_panel=RUN, help="Images to encode at once.", show_default="1"
        ),
    ] = None,
    device: DeviceOpt = "auto",
    dtype: DTypeOpt = "auto",
    shard: ShardOpt = None,
    cluster: ClusterOpt = None,
    workers: WorkersOpt = None,
    threads: ThreadsOpt = None,
    gpus_per_worker: GpusOpt = None,
    models_file: ModelsFileOpt = None,
    offline: OfflineOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Encode images to latents, in .safetensors files that ComfyUI reads too.

    Each path is printed as soon as its file is written. A second run skips finished files. The latents are not
    multiplied by the VAE's scaling factor. --dtype auto is float32 here, for the best quality.
    """
    console = Console(quiet=quiet, verbose=verbose, json=as_json)
    if fit is not None and size is None:
        raise UsageError("--fit has no effect without --size")
    if seed is not None and not sample:
        raise UsageError("--seed has no effect without --sample")
    if output is not None and outdir is not None:
        raise UsageError("use either -o or --outdir")
    if output is not None and not pack and (len(images) > 1 or images[0].is_dir()):
        raise UsageError("-o is for a single file; use --outdir or --pack for several images")
    if output is not None and output.suffix.lower() not in (".safetensors", ".latent"):
        raise UsageError(f"-o: {output.name!r} should end in .safetensors or .latent")
    part = RunShard.of(shard) if shard is not None else WHOLE
    nodes = cluster_settings(cluster, workers=workers, threads=threads, gpus=gpus_per_worker, device=device)
    check_divided(shard, cluster, output)
    spec = load_registry(models_file).find(model)
    # images in other formats fail one by one: none is passed over
    files = input_files(images, suffixes=IMAGE_SUFFIXES | UNREAD_SUFFIXES, kind="images")
    stop = GracefulStop(console).install()

    from sdcli.generation.encode_plan import EncodeSettings
    from sdcli.generation.vae_output import check_output

    settings = EncodeSettings(
        outdir=outdir or EncodeSettings.outdir,
        output=output,
        pack=pack,
        size=_size(size) if size is not None else None,
        fit=fit or "crop",
        sample_seed=(seed or 0) if sample else None,
        half=half,
        batch_size=batch_size,
        check=check,
        overwrite=overwrite,
    )
    check_output(settings.outdir, settings.output)
    run = RunSettings(device=device, dtype=dtype, offline=offline)
    if nodes is not None:
        events = _on_cluster(files, spec, run, settings, nodes, console, stop)
    else:
        console.note(f"loading the VAE of {spec.name}")
        events = _here(files, spec, run, settings, part, stop)
    alone = len(images) == 1 and not images[0].is_dir()
    errors: list[SdcliError] = []
    decibels: list[float] = []
    count, packs = 0, set[Path | None]()
    for event in events:
        count += 1
        errors += [event.error] if event.error is not None else []
        decibels += [event.psnr] if event.psnr is not None else []
        named = event.path in packs and not as_json and not check  # a packed file is printed once
        if not named or event.error is not None:
            _report(event, console, alone=alone)
        if pack and event.error is None:
            packs.add(event.path)
    if decibels:
        mean = sum(decibels) / len(decibels)
        text = f"mean PSNR {_decibels(mean)} over {len(decibels)} images"
        console.result(text, status="summary", pictures=len(decibels), mean_psnr=_finite(mean))
    if not count:
        console.note(f"shard {part} has nothing to do: there are fewer batches than shards")
    raise_for(errors, of=count)


def _here(
    files: Iterator[InputFile],
    spec: ModelSpec,
    run: RunSettings,
    settings: EncodeSettings,
    part: RunShard,
    stop: Stop,
) -> Iterator[EncodeResult]:
    from sdcli.generation.encode_files import encode_files
    from sdcli.generation.model_cache import ModelCache

    with ModelCache(run).lease_vae(spec) as vae:
        yield from encode_files(files, vae, settings, shard=part, stop=stop)


def _on_cluster(
    files: Iterator[InputFile],
    spec: ModelSpec,
    run: RunSettings,
    settings: EncodeSettings,
    cluster: ClusterSettings,
    console: Console,
    stop: Stop,
) -> Iterator[EncodeResult]:
    from sdcli.cli.cluster_results import results_of_cluster
    from sdcli.cluster.files_driver import encode

    found = list(files)
    events = encode(found, spec, run, settings, cluster, stop=stop)
    yield from results_of_cluster(events, console, total=len(found), things="images")


def _size(text: str) -> tuple[int, int]:
    size = parse_size(text)
    if any(side % 8 or not 8 <= side <= 8192 for side in size):
        raise UsageError(f"--size takes multiples of 8 from 8 to 8192, not {text}")
    return size


def _report(event: EncodeResult, console: Console, *, alone: bool) -> None:
    """One image as one line: the path, with --check and its PSNR; the sentence of a failure goes to stderr."""
    for note in event.notes:
        console.warn(f"{event.source}: {note}")
    fields = {"status": event.status, "source": str(event.source)}
    if event.error is not None:
        if console.json:
            console.result("", **fields, error=str(event.error), exit_code=event.error.exit_code)
        if not alone:
            console.warn(str(event.error))
        return
    facts = event.facts
    assert facts is not None
    if event.status == "skipped":
        console.note(f"{event.path} exists already, from {event.source}")
    if event.status == "skipped" and not console.json and event.psnr is None:
        return
    checked = {"psnr": _finite(event.psnr), "identical": event.psnr == math.inf} if event.psnr is not None else {}
    console.result(
        event.path or "",
        f"\t{_decibels(event.psnr)}" if event.psnr is not None else "",
        **fields,
        path=str(event.path),
        width=facts.width,
        height=facts.height,
        fitted_width=facts.fitted_width,
        fitted_height=facts.fitted_height,
        sha256=facts.sha256,
        fallbacks=list(facts.fallbacks),
        **checked,
    )


def _decibels(value: float) -> str:
    return f"{value:.2f} dB" if math.isfinite(value) else "identical"


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return round(value, 4) if math.isfinite(value) else None
