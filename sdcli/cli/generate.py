"""`sdcli generate`: generate images from prompts, prompt files and the settings of earlier images."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sdcli.cli.options.cluster import (
    CLUSTER,
    ClusterOpt,
    GpusOpt,
    ThreadsOpt,
    WorkersOpt,
    cluster_settings,
    refuse_with_cluster,
)
from sdcli.cli.options.flags import field_options
from sdcli.cli.options.from_image import recorded_fields
from sdcli.cli.options.prompts import dynamic_lines, left_as_text, prompt_lines
from sdcli.cli.options.request_flags import CONTROL, FLAGS, IMAGE, MODEL, START
from sdcli.cli.options.sharding import check_sharding, part_of, reports, start_journal
from sdcli.cli.options.shared import (
    DeviceOpt,
    DTypeOpt,
    JsonOpt,
    ModelsFileOpt,
    OfflineOpt,
    OverwriteOpt,
    QuietOpt,
    ShardOpt,
    VerboseOpt,
)
from sdcli.cli.refusals import refusals
from sdcli.cli.sweep_sheet import SweepSheet
from sdcli.cli.ui.console import Console, readable_json
from sdcli.cli.ui.preview import TERMINAL, Preview, check_preview, check_terminal, to_file
from sdcli.cli.ui.progress import GenerationProgress
from sdcli.cli.ui.results import report, report_failure
from sdcli.cli.ui.signals import GracefulStop
from sdcli.cli.ui.terminal_images import best_renderable
from sdcli.cli.warm_worker import OPT_OUT, check_keep_warm, generate_events, seconds_of
from sdcli.errors import UsageError, raise_for, same_for_all
from sdcli.generation.events import Note, Phase, Progress, Result
from sdcli.generation.filenames import check_distinct_names, check_output, known_paths, output_settings
from sdcli.generation.journal import Journal
from sdcli.generation.resolve.job_spool import JobSpool
from sdcli.generation.resolve.jobs import BadJob, ResolvedJob, expand
from sdcli.generation.run_shard import RunShard
from sdcli.generation.settings import OutputSettings, RunSettings, TraceFormat, TraceSettings
from sdcli.generation.writer import Writer
from sdcli.images.formats import ImageFormat
from sdcli.models.registry import load_registry
from sdcli.request.fields import ImageInput
from sdcli.request.input_files import stdin_bytes
from sdcli.request.schedulers import SCHEDULERS
from sdcli.request.schema import GenerationRequest, canonical, parse_size
from sdcli.request.sweep import parse_axis, swept
from sdcli.request.wildcards import Wildcards

PROMPTS, OUTPUT, EXPLAIN, RUN = "Prompts", "Output", "Explanations", "The run"
SECTIONS = (PROMPTS, MODEL, IMAGE, START, CONTROL, OUTPUT, EXPLAIN, RUN, CLUSTER)
_prompts, _image, _output, _explain, _run = (
    partial(typer.Option, rich_help_panel=panel) for panel in (PROMPTS, IMAGE, OUTPUT, EXPLAIN, RUN)
)


@field_options(GenerationRequest, FLAGS, sections=SECTIONS)
def command(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="The text to generate an image from; may be repeated.")
    ] = None,
    prompts_file: Annotated[
        str | None,
        _prompts(
            "--prompts-file",
            metavar="FILE",
            help="Read jobs from a text file (a prompt a line), a JSON, JSONL, CSV or TSV file, or from stdin (-).",
        ),
    ] = None,
    from_image: Annotated[
        Path | None,
        _prompts(
            "--from",
            metavar="IMAGE",
            help="Start from the settings stored in an image; other options replace single ones.",
        ),
    ] = None,
    without: Annotated[
        str | None,
        _prompts(
            "--without",
            metavar="FIELD,...",
            help="Drop these settings of --from, such as lora,refiner, and those that need them.",
        ),
    ] = None,
    verify: Annotated[
        bool, _prompts("--verify", help="Generate the image of --from again, and report whether it is identical.")
    ] = False,
    dynamic_prompts: Annotated[
        bool,
        _prompts(
            "--dynamic-prompts",
            help="Choose between alternatives in prompts, {red|blue} or {2$$a|b|c}, by the seed of each image.",
        ),
    ] = False,
    wildcards: Annotated[
        Path | None,
        _prompts(
            "--wildcards",
            metavar="DIR",
            help="Like --dynamic-prompts, and __animals__ becomes a line of DIR/animals.txt.",
        ),
    ] = None,
    all_combinations: Annotated[
        bool, _prompts("--all-combinations", help="Like --dynamic-prompts, but generate every combination.")
    ] = False,
    num_images: Annotated[
        int, _image("--num-images", "-n", min=1, help="Images per prompt, with the seeds seed, seed+1 and so on.")
    ] = 1,
    sweep: Annotated[
        list[str] | None,
        _prompts(
            "--sweep",
            metavar="FIELD=VALUES",
            help="Generate an image for each value, steps=10,20 or "
            "guidance-scale=1..9x3 (3 values from 1 to 9), and a contact sheet; repeat for all combinations.",
        ),
    ] = None,
    size: Annotated[str | None, _image("--size", metavar="WxH", help="Width and height in pixels, as 512x768.")] = None,
    output: Annotated[
        str | None,
        _output("--output", "-o", metavar="NAME", help="File name, or a template: {index:05}-{seed}-{prompt}.png."),
    ] = None,
    outdir: Annotated[
        Path | None, _output("--outdir", metavar="DIR", show_default="outputs", help="Folder for the images.")
    ] = None,
    image_format: Annotated[ImageFormat | None, _output("--format", show_default="png", help="File format.")] = None,
    lora_dir: Annotated[
        Path | None,
        _run("--lora-dir", metavar="DIR", help="Folder in which --lora NAME and <lora:NAME:0.8> find their files."),
    ] = None,
    overwrite: OverwriteOpt = False,
    no_metadata: Annotated[bool, _output("--no-metadata", help="Store no settings in the images.")] = False,
    resume: Annotated[
        bool, _output("--resume", help="Skip the images that an earlier run of the same --prompts-file finished.")
    ] = False,
    trace: Annotated[
        str | None,
        _explain(
            "--trace",
            metavar="N|STEP,...|all",
            help="Also write the denoising of each image, as a strip of N or of the named steps, and as an animation.",
        ),
    ] = None,
    trace_format: Annotated[
        TraceFormat | None, _explain("--trace-format", show_default="webp", help="File format of the animation.")
    ] = None,
    heatmap: Annotated[
        str | None,
        _explain(
            "--heatmap",
            metavar="WORD,...|all",
            help="Also write where in each image these words or phrases of the prompt received attention.",
        ),
    ] = None,
    preview: Annotated[
        str | None,
        _explain(
            "--preview",
            metavar="FILE.png|terminal",
            help="Show the images during denoising, in a file or on the terminal.",
        ),
    ] = None,
    show: Annotated[bool, _explain("--show", help="Show finished images on the terminal.")] = False,
    batch_size: Annotated[
        int | None, _run("--batch-size", min=1, max=256, show_default="auto", help="Images to generate at once.")
    ] = None,
    device: DeviceOpt = "auto",
    dtype: DTypeOpt = "auto",
    safety: Annotated[
        Literal["auto", "off"],
        _run(
            "--safety",
            help="Save no image that the model's safety checker flags; auto uses the checker if "
            "`models pull --safety-checker` fetched it.",
        ),
    ] = "auto",
    strict_prompt: Annotated[
        bool,
        _run("--strict-prompt", help="Refuse a plain prompt that is too long for the model, instead of cutting it."),
    ] = False,
    dry_run: Annotated[
        bool, _run("--dry-run", help="Print the resolved requests as JSON, and generate nothing.")
    ] = False,
    keep_warm: Annotated[
        str | None,
        _run(
            "--keep-warm",
            metavar="TIME",
            help="Start a worker in the background, which keeps torch and the model loaded until it has had nothing to "
            "do for this time, such as 15m.",
        ),
    ] = None,
    no_server: Annotated[
        bool,
        _run("--no-server", help=f"Do not use a warm worker, of --keep-warm or `sdcli serve` (or set {OPT_OUT}=1)."),
    ] = False,
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
    *,
    typed: dict[str, Any],
) -> None:
    """Generate images, and print the path of each as soon as it is written."""
    console = Console(quiet=quiet, verbose=verbose, json=as_json)
    if typed.get("scheduler") == "help":
        for name, entry in SCHEDULERS.items():
            console.result(f"{name:16} {entry.summary}", name=name, summary=entry.summary, diffusers=entry.class_name)
        return
    if size is not None:
        if {"width", "height"} & set(typed):
            raise UsageError("use either --size or --width and --height")
        typed["width"], typed["height"] = parse_size(size)
    typed = canonical(typed)
    run = RunSettings(
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        offline=offline,
        strict_prompt=strict_prompt,
        safety=safety,
        lora_dir=lora_dir,
    )
    nodes = cluster_settings(cluster, workers=workers, threads=threads, gpus=gpus_per_worker, device=device)
    if nodes is not None:
        refuse_with_cluster(verify=verify, dry_run=dry_run, trace=trace, trace_format=trace_format, heatmap=heatmap)
        refuse_with_cluster(preview=preview, show=show, keep_warm=keep_warm)
        if prompts_file is None:
            raise UsageError("--cluster needs --prompts-file, whose journal says which images are finished")
    registry, axes = load_registry(models_file), [parse_axis(text) for text in sweep or ()]
    dynamic = dynamic_prompts or all_combinations or wildcards is not None
    if trace_format is not None and trace is None:
        raise UsageError("--trace-format has no effect without --trace")
    traced = None if trace is None else TraceSettings.of(trace, trace_format or "webp")
    words = None if heatmap is None else _words(heatmap)
    explained = traced is not None or words is not None or preview is not None or show
    if explained and dry_run:
        raise UsageError("--trace, --heatmap, --preview and --show have no effect with --dry-run")
    part = None if shard is None else RunShard.of(shard)
    if part is not None:
        check_sharding(prompts_file, template=output, sweep=sweep, keep_warm=keep_warm, cluster=cluster)
    kept = None if keep_warm is None else seconds_of(keep_warm)
    if kept is not None:
        if no_server or dry_run:
            raise UsageError(f"--keep-warm has no effect with {'--no-server' if no_server else '--dry-run'}")
        check_keep_warm()
    if show:
        check_terminal("--show")
    if preview is not None:
        check_preview(preview, overwrite=overwrite, quiet=quiet)

    if verify:
        others = (
            without,
            prompts,
            prompts_file,
            typed,
            num_images != 1,
            resume,
            sweep,
            dynamic,
            explained,
            dry_run,
            kept,
            part,
            safety != "auto",
            lora_dir,
        )
        written = (output, outdir, image_format, overwrite, no_metadata, batch_size, strict_prompt)
        if from_image is None or any((*others, *written)):
            raise UsageError("--verify goes with --from IMAGE alone: it generates exactly what the image records")
        from sdcli.generation.verify import verify_image

        verdict = verify_image(from_image, registry, run)
        console.result(verdict.sentence(), **verdict.as_dict())
        verdict.raise_if_different()
        return

    own, recorded = typed, {}
    if from_image is not None:
        replaced = {*typed, *(name for axis in axes for value in axis.values for name in axis.fields(value))}
        change: dict[str, Any] = {"without": without, "typed": typed, "replaced": replaced}
        recorded = recorded_fields(from_image, **change, console=console, lora_dir=lora_dir)
        typed = {**recorded, **own}
    elif without is not None:
        raise UsageError("--without needs --from IMAGE, whose settings it drops")
    if resume and prompts_file is None:
        raise UsageError("--resume needs --prompts-file: it skips what an earlier run of that file finished")
    example = {**typed, **{axis.field: axis.values[0] for axis in axes}}
    lines = prompt_lines(prompts or [], prompts_file, example, registry)
    choices = Wildcards(wildcards) if dynamic else None
    if choices is not None:
        lines = dynamic_lines(lines, example, axes, choices, all_combinations=all_combinations)
    else:
        lines = left_as_text(lines, typed, console.note)
    settings = replace(
        output_settings(output, outdir, image_format),
        overwrite=overwrite,
        metadata=not no_metadata,
        resume=resume,
        trace=traced,
        heatmap=words,
    )
    journal, source, base_seed = None, "", secrets.randbelow(2**32)
    if prompts_file is not None:
        journal, source, base_seed = start_journal(prompts_file, settings, part)
    expanded = expand(
        swept(lines, axes, typed, base_seed=base_seed) if axes else lines,
        own,
        registry,
        num_images=num_images,
        base_seed=base_seed,
        measure=_measure,
        lora_dir=lora_dir,
        wildcards=None if all_combinations else choices,
        recorded=recorded,
    )
    jobs: Sequence[ResolvedJob | BadJob] = list(expanded) if nodes is None else JobSpool(expanded)
    if not jobs:
        raise UsageError(f"no prompts in {prompts_file}")
    if part is not None:
        check_distinct_names((job for job in jobs if isinstance(job, ResolvedJob)), settings)
    if dry_run:
        _print_requests(jobs if part is None else part_of(jobs, part, run), console)
    else:
        sheet = SweepSheet.of(jobs, axes, num_images=num_images) if axes else None
        if nodes is not None and stdin_bytes.cache_info().currsize:
            raise UsageError("--cluster takes no image from stdin, which the workers cannot read; save it as a file")
        where: dict[str, Any] = {"use": not no_server and part is None, "keep": kept}
        if nodes is not None:
            where = {"cluster": nodes, "begun": (source, base_seed)}
        _generate(
            jobs, run, settings, journal, console, sheet=sheet, preview=preview, show=show, where=where, part=part
        )


def _words(text: str) -> tuple[str, ...]:
    """The words of --heatmap; `all` is every word, an empty tuple. Raises UsageError for no word."""
    words = tuple(dict.fromkeys(filter(None, (word.strip() for word in text.split(",")))))
    if not words:
        raise UsageError("--heatmap takes words of the prompt, such as fox,snow, or all")
    return () if text == "all" else words


def _measure(start: ImageInput, cell: int) -> tuple[int, int]:
    """Width and height of an init image; the module that reads images is imported only where there is one."""
    from sdcli.diffusion.input_images import measure

    return measure(start, cell)


def _print_requests(jobs: Sequence[ResolvedJob | BadJob], console: Console) -> None:
    errors = [job.error for job in jobs if isinstance(job, BadJob)]
    alone = same_for_all(errors, of=len(jobs))
    for job in jobs:
        if not isinstance(job, BadJob):
            fields = job.request.typed()
            console.result(readable_json(fields), **fields)
        elif not alone:  # else `raise_for` says it
            console.warn(str(job.error))
    raise_for(errors, of=len(jobs))


def _generate(
    jobs: Sequence[ResolvedJob | BadJob],
    run: RunSettings,
    settings: OutputSettings,
    journal: Journal | None,
    console: Console,
    *,
    sheet: SweepSheet | None,
    preview: str | None,
    show: bool,
    where: dict[str, Any],
    part: RunShard | None,
) -> None:
    """Generate what can be generated, report it, and lay it out on the sheet of a sweep.

    `where`: options of `generate_events`, in this process or a warm worker, or of `cluster_events`.

    Bad requests, unusable folders and missing models are reported before torch is imported. Of a shard, models are
    not looked for: what one machine lacks must not change which batches the others have.
    """
    alone = len(jobs) == 1
    refused = dict(refusals(jobs, settings, models=part is None and not settings.resume))
    errors = [error for index, error in refused.items() if reports(part, index)]
    count = len(jobs) if part is None else len(errors)
    for job in jobs if refused else ():
        if job.index in refused and reports(part, job.index):
            report_failure(job, refused[job.index], console, alone=same_for_all(errors, of=len(jobs)))
    good: Sequence[ResolvedJob]
    if isinstance(jobs, JobSpool):
        good = jobs.resolved(without=refused)
    else:
        good = [job for job in jobs if isinstance(job, ResolvedJob) and job.index not in refused]
    if not good:
        raise_for(errors, of=count)
        return
    check_output(settings)
    if preview is not None and Path(preview).resolve() in [path.resolve() for path in known_paths(settings)]:
        raise UsageError(f"--preview and -o name the same file, {preview}")
    if sheet is not None:
        try:
            sheet.check()
        except UsageError as error:
            console.warn(f"no contact sheet of the sweep: {error}")
            sheet = None
    stop = GracefulStop(console, unit="the current step" if "cluster" in where else "the current image").install()
    renderable = best_renderable() if show else None
    paths: dict[int, Path] = {}
    kept = 0
    with GenerationProgress(console, images=preview == TERMINAL) as display:
        watched = None
        if preview is not None:
            shown = display.image if preview == TERMINAL else to_file(Path(preview))
            watched = Preview(shown, warn=console.warn, detail=console.detail)
        if "cluster" in where:
            from sdcli.cli.on_cluster import cluster_events

            assert journal is not None
            events = cluster_events(good, run, settings, journal, console=console, bar=display, stop=stop, **where)
        else:
            writer, previews = Writer(settings, journal, shard=part), preview is not None
            events = generate_events(good, run, writer, console, stop=stop, previews=previews, **where)
        for event in events:
            count += part is not None and isinstance(event, Result)
            if isinstance(event, Phase):
                display.phase(event)
            elif isinstance(event, Progress):
                display.step(event)
                if watched is not None:
                    watched.step(event)
            elif isinstance(event, Note):
                console.warn(event.text)
            elif event.error is not None:
                errors.append(event.error)
                report_failure(event.job, event.error, console, alone=alone, status=event.status)
            else:
                report(event, console)
                kept += event.status == "skipped"
                assert event.path is not None
                if sheet is not None:
                    paths[event.job.index] = event.path
                if renderable is not None and event.status == "done":
                    from sdcli.images.image_files import open_image

                    display.show(renderable(open_image(event.path)))
    if kept:
        console.note(f"{kept} of {len(good)} images were finished before, and stay as they are")
    if sheet is not None and paths:
        sheet.write(paths, settings, console)
    if part is not None and not count:
        console.note(f"shard {part} has nothing to do: the run has fewer batches than shards")
    raise_for(errors, of=count)
