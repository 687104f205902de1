"""`sdcli decode`: decode latent files to images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    OverwriteOpt,
    QuietOpt,
    ShardOpt,
    VerboseOpt,
)
from sdcli.cli.ui.console import Console
from sdcli.cli.ui.signals import GracefulStop
from sdcli.errors import SdcliError, UsageError, raise_for
from sdcli.generation.journal import Journal
from sdcli.generation.run_shard import WHOLE, RunShard
from sdcli.generation.settings import RunSettings
from sdcli.images.formats import FORMAT_OF, ImageFormat
from sdcli.models.registry import Registry, load_registry
from sdcli.request.input_files import InputFile, input_files

if TYPE_CHECKING:
    from sdcli.cluster.ray_engine import ClusterSettings
    from sdcli.generation.decode_plan import DecodeResult, DecodeSettings

LATENTS = frozenset({".safetensors", ".latent", ".npy"})


def command(
    latents: Annotated[
        list[Path],
        typer.Argument(
            metavar="LATENTS",
            readable=False,
            help="Files written by `sdcli encode`, ComfyUI (.latent), or plain .safetensors or .npy; or folders.",
        ),
    ],
    model: ModelOpt = None,
    scaled: Annotated[
        bool | None,
        typer.Option(
            "--scaled/--unscaled",
            help="Whether plain files hold latents that are multiplied by the VAE's scaling factor; other files record "
            "it.",
            show_default="unscaled",
        ),
    ] = None,
    tile: Annotated[
        bool,
        typer.Option(
            "--tile", help="Decode in tiles, which needs less memory; automatic after an out-of-memory error."
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="File to write, for a single image.")
    ] = None,
    outdir: Annotated[
        Path | None, typer.Option("--outdir", metavar="DIR", show_default="outputs", help="Folder for the images.")
    ] = None,
    image_format: Annotated[
        ImageFormat | None, typer.Option("--format", help="File format.", show_default="png")
    ] = None,
    overwrite: OverwriteOpt = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Skip the images that an earlier run with --resume, --shard or --cluster finished, and those that are "
            "there already with the same bytes.",
        ),
    ] = False,
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
    """Decode latents to images, and print the path of each as soon as it is written.

    Without -m the model recorded in the file is used. --dtype auto is float32 here, for the best quality.
    """
    console = Console(quiet=quiet, verbose=verbose, json=as_json)
    if output is not None and outdir is not None:
        raise UsageError("use either -o or --outdir")
    if output is not None and (len(latents) > 1 or latents[0].is_dir()):
        raise UsageError("-o is for a single image; use --outdir for several files")
    part = RunShard.of(shard) if shard is not None else WHOLE
    nodes = cluster_settings(cluster, workers=workers, threads=threads, gpus=gpus_per_worker, device=device)
    check_divided(shard, cluster, output)
    format = _format(output, image_format)
    registry = load_registry(models_file)
    if model is not None:
        registry.find(model)
    files = input_files(latents, suffixes=LATENTS, kind="latent files")
    stop = GracefulStop(console).install()

    from sdcli.generation.decode_plan import DecodeSettings
    from sdcli.generation.vae_output import check_output

    settings = DecodeSettings(
        outdir=outdir or DecodeSettings.outdir,
        output=output,
        format=format,
        scaled=scaled,
        tiled=tile,
        overwrite=overwrite,
        resume=resume,
    )
    check_output(settings.outdir, settings.output)
    journal = None
    if resume or shard is not None:
        folder = settings.outdir if output is None else output.parent
        journal = Journal(folder, part.name if shard is not None else None)
    run = RunSettings(device=device, dtype=dtype, offline=offline)
    alone = len(latents) == 1 and not latents[0].is_dir()
    errors: list[SdcliError] = []
    count = 0
    ways: dict[str, Any] = {"model": model, "stop": stop}
    if nodes is not None:
        events = _on_cluster(files, registry, run, settings, nodes, console, **ways)
    else:
        events = _here(files, registry, run, settings, journal=journal, shard=part, **ways)
    for event in events:
        if count == 1 and alone and errors:
            console.warn(str(errors[0]))  # it is not the only image, so it does not end the process
        count += 1
        errors += [event.error] if event.error is not None else []
        _report(event, console, printed=alone and count == 1)
    if not count:
        console.note(f"shard {part} has nothing to do: there are fewer files than shards")
    raise_for(errors, of=count)


def _here(
    files: Iterator[InputFile], registry: Registry, run: RunSettings, settings: DecodeSettings, **ways: Any
) -> Iterator[DecodeResult]:
    from sdcli.generation.decode_files import decode_files
    from sdcli.generation.model_cache import ModelCache

    yield from decode_files(files, registry, ModelCache(run), settings, **ways)


def _on_cluster(
    files: Iterator[InputFile],
    registry: Registry,
    run: RunSettings,
    settings: DecodeSettings,
    cluster: ClusterSettings,
    console: Console,
    **ways: Any,
) -> Iterator[DecodeResult]:
    from sdcli.cli.cluster_results import results_of_cluster
    from sdcli.cluster.files_driver import decode

    found = list(files)
    events = decode(found, registry, run, settings, cluster, **ways)
    yield from results_of_cluster(events, console, total=len(found), things="files")


def _format(output: Path | None, image_format: ImageFormat | None) -> ImageFormat:
    if output is None:
        return image_format or "png"
    named = FORMAT_OF.get(output.suffix.lower())
    if named is None:
        raise UsageError(f"-o: {output.name!r} should end in {', '.join(FORMAT_OF)}")
    if image_format not in (None, named):
        raise UsageError(f"-o names a {named} file, but --format is {image_format}")
    return named


def _report(event: DecodeResult, console: Console, *, printed: bool) -> None:
    """Print one image as a line, or its error on stderr unless it is `printed` when the process ends."""
    for note in event.notes:
        console.warn(note)
    fields = {"status": event.status, "source": str(event.source), "index": event.index}
    if event.error is not None:
        if console.json:
            console.result("", **fields, error=str(event.error), exit_code=event.error.exit_code)
        if not printed:
            console.warn(str(event.error))
        return
    if event.status == "skipped":
        console.note(f"{event.path} is finished already")
        if not console.json:
            return
    console.result(
        event.path or "",
        **fields,
        path=str(event.path),
        width=event.width,
        height=event.height,
        model=event.model,
        notes=list(event.notes),
    )
