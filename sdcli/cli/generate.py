"""`sdcli generate`: generate images from prompts, prompt files and earlier images."""

from __future__ import annotations

import json
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sdcli.cli.options.flags import field_options
from sdcli.cli.options.from_image import kept, left_of, recorded_fields
from sdcli.cli.options.request_flags import CONTROL, FLAGS, IMAGE, MODEL, START
from sdcli.cli.options.shared import (
    DeviceOpt,
    DTypeOpt,
    JsonOpt,
    ModelsFileOpt,
    OfflineOpt,
    OverwriteOpt,
    QuietOpt,
    VerboseOpt,
)
from sdcli.cli.preflight import Preflight
from sdcli.cli.sweep_sheet import SweepSheet
from sdcli.cli.ui.console import Console
from sdcli.cli.ui.preview import TERMINAL, Preview, check_preview, check_terminal, to_file
from sdcli.cli.ui.progress import ProgressDisplay
from sdcli.cli.ui.results import report, report_failure
from sdcli.cli.ui.signals import GracefulStop
from sdcli.cli.ui.terminal_images import best_renderable
from sdcli.errors import UsageError, raise_for, same_for_all
from sdcli.generation.filenames import check_output, known_paths, output_settings
from sdcli.generation.journal import Journal
from sdcli.generation.resolve.jobs import BadJob, ResolvedJob, expand
from sdcli.generation.settings import (
    OutputSettings,
    RunSettings,
    TraceFormat,
    TraceSettings,
)
from sdcli.images.formats import ImageFormat
from sdcli.models.registry import Registry, load_registry
from sdcli.request.fields import ImageInput
from sdcli.request.jobs import DYNAMIC, Line, combinations, read_lines
from sdcli.request.schedulers import SCHEDULERS
from sdcli.request.schema import GenerationRequest, canonical, parse_size
from sdcli.request.sweep import Axis, parse_axis, swept
from sdcli.request.wildcards import Wildcards

INPUT, OUTPUT, EXPLAIN, RUN = "Prompts", "Output", "Explanations", "The run"
SECTIONS = (INPUT, MODEL, IMAGE, START, CONTROL, OUTPUT, EXPLAIN, RUN)


@field_options(GenerationRequest, FLAGS, sections=SECTIONS)
def command(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to generate; several prompts are several jobs.")
    ] = None,
    prompts_file: Annotated[
        str | None,
        typer.Option(
            "--prompts-file",
            metavar="FILE",
            rich_help_panel=INPUT,
            help="Jobs from a .txt (a prompt a line), .jsonl or .csv file; - reads stdin.",
        ),
    ] = None,
    from_image: Annotated[
        Path | None,
        typer.Option("--from", metavar="IMAGE", rich_help_panel=INPUT, help="Begin with the settings of an image."),
    ] = None,
    without: Annotated[
        str | None,
        typer.Option(
            "--without",
            metavar="FIELD,FIELD,...",
            rich_help_panel=INPUT,
            help="Leave these settings of --from out, as lora or refiner, with what has no effect without them.",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", rich_help_panel=INPUT, help="Paint --from again, and say whether it is identical."),
    ] = False,
    dynamic_prompts: Annotated[
        bool,
        typer.Option(
            "--dynamic-prompts",
            rich_help_panel=INPUT,
            help="Make the choices in prompts, as {red|blue} or {2$$a|b|c}, by each image's seed.",
        ),
    ] = False,
    wildcards: Annotated[
        Path | None,
        typer.Option(
            "--wildcards",
            metavar="DIR",
            rich_help_panel=INPUT,
            help="The same, and __animals__ becomes a line of DIR/animals.txt.",
        ),
    ] = None,
    all_combinations: Annotated[
        bool,
        typer.Option("--all-combinations", rich_help_panel=INPUT, help="The same, but every choice instead of one."),
    ] = False,
    num_images: Annotated[
        int,
        typer.Option("--num-images", "-n", min=1, rich_help_panel=IMAGE, help="Images per prompt: seed, seed+1, ..."),
    ] = 1,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="FIELD=VALUES",
            rich_help_panel=INPUT,
            help="Paint all values (steps=10,20 or guidance-scale=1..9x3) and a sheet of them; repeat for more axes.",
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="WxH", rich_help_panel=IMAGE, help="Width and height, as 512x768.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="NAME",
            rich_help_panel=OUTPUT,
            help="A file name, or a template such as {index:05}-{seed}-{prompt}.png.",
        ),
    ] = None,
    outdir: Annotated[
        Path | None, typer.Option("--outdir", rich_help_panel=OUTPUT, help="The folder for the images (outputs).")
    ] = None,
    image_format: Annotated[
        ImageFormat | None,
        typer.Option("--format", rich_help_panel=OUTPUT, help="File format (png).", show_default=False),
    ] = None,
    lora_dir: Annotated[
        Path | None,
        typer.Option(
            "--lora-dir",
            metavar="DIR",
            rich_help_panel=RUN,
            help="Where LoRAs are looked up by name, for --lora NAME and <lora:NAME:0.8> in a prompt.",
        ),
    ] = None,
    overwrite: OverwriteOpt = False,
    no_metadata: Annotated[
        bool, typer.Option("--no-metadata", rich_help_panel=OUTPUT, help="Write no settings into the images.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", rich_help_panel=OUTPUT, help="Skip what an earlier run of the prompts file finished."),
    ] = False,
    trace: Annotated[
        str | None,
        typer.Option(
            "--trace",
            metavar="N|STEP,STEP,...|all",
            rich_help_panel=EXPLAIN,
            help="Write the denoising beside each image: a strip of N steps, or of these, and an animation.",
        ),
    ] = None,
    trace_format: Annotated[
        TraceFormat | None,
        typer.Option(
            "--trace-format", rich_help_panel=EXPLAIN, help="Form of the animation (webp).", show_default=False
        ),
    ] = None,
    heatmap: Annotated[
        str | None,
        typer.Option(
            "--heatmap",
            metavar="WORD,WORD,...|all",
            rich_help_panel=EXPLAIN,
            help="Write beside each image where these words, or phrases, of its prompt were attended to.",
        ),
    ] = None,
    preview: Annotated[
        str | None,
        typer.Option(
            "--preview",
            metavar="FILE.png|terminal",
            rich_help_panel=EXPLAIN,
            help="Show how the images come along, in a file that is replaced or on the terminal.",
        ),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", rich_help_panel=EXPLAIN, help="Show finished images on the terminal, too.")
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", min=1, max=256, rich_help_panel=RUN, help="Images at once (auto).", show_default=False
        ),
    ] = None,
    device: DeviceOpt = "auto",
    dtype: DTypeOpt = "auto",
    safety: Annotated[
        Literal["auto", "off"],
        typer.Option(
            "--safety",
            rich_help_panel=RUN,
            help="auto asks a model's own safety checker, where it is here (models pull --safety-checker).",
        ),
    ] = "auto",
    strict_prompt: Annotated[
        bool,
        typer.Option(
            "--strict-prompt",
            rich_help_panel=RUN,
            help="Refuse a plain prompt that is too long, instead of cutting it.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", rich_help_panel=RUN, help="Print the resolved requests as JSON and generate nothing."
        ),
    ] = False,
    models_file: ModelsFileOpt = None,
    offline: OfflineOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
    *,
    typed: dict[str, Any],
) -> None:
    """Paint images. Each path is printed as soon as the image is on the disk."""
    console = Console(quiet=quiet, verbose=verbose, json=as_json)
    if typed.get("scheduler") == "help":
        for name, entry in SCHEDULERS.items():
            console.result(f"{name:16} {entry.summary}", name=name, summary=entry.summary, diffusers=entry.class_name)
        return
    if size is not None:
        if {"width", "height"} & set(typed):
            raise UsageError("--size goes without --width and --height")
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
    registry, axes = load_registry(models_file), [parse_axis(text) for text in sweep or ()]
    dynamic = dynamic_prompts or all_combinations or wildcards is not None
    if trace_format is not None and trace is None:
        raise UsageError("--trace-format has no effect without --trace")
    traced = None if trace is None else TraceSettings.of(trace, trace_format or "webp")
    words = None if heatmap is None else _words(heatmap)
    explained = traced is not None or words is not None or preview is not None or show
    if explained and dry_run:
        raise UsageError("--trace, --heatmap, --preview and --show have no effect with --dry-run")
    if show:
        check_terminal("--show")
    if preview is not None:
        check_preview(preview, overwrite=overwrite, quiet=quiet)

    if verify:
        others: list[Any] = [
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
        ]
        others += [output, outdir, image_format, overwrite, no_metadata, batch_size, strict_prompt]
        if from_image is None or any(others):
            raise UsageError("--verify goes with --from IMAGE alone: it paints exactly what the picture says")
        from sdcli.generation.verify import verify_image

        verdict = verify_image(from_image, registry, run)
        console.result(verdict.sentence(), **verdict.as_dict())
        verdict.raise_if_different()
        return

    if from_image is not None:
        recorded = recorded_fields(from_image, console=console, lora_dir=lora_dir)
        if without is not None:
            recorded = left_of(recorded, without, typed=typed)
        swept_fields = {name for axis in axes for value in axis.values for name in axis.fields(value)}
        typed = {**kept(recorded, {*typed, *swept_fields}), **typed}
    elif without is not None:
        raise UsageError("--without leaves out settings of --from IMAGE, and there is none")
    asked = {**typed, **{axis.field: axis.values[0] for axis in axes}}
    lines = _lines(prompts or [], prompts_file, asked, registry)
    choices = Wildcards(wildcards) if dynamic else None
    if choices is not None:
        lines = _with_choices(lines, asked, axes, choices, all_combinations=all_combinations)
    if resume and prompts_file is None:
        raise UsageError("--resume goes with --prompts-file: it skips what an earlier run of that file finished")
    settings = replace(
        output_settings(output, outdir, image_format),
        overwrite=overwrite,
        metadata=not no_metadata,
        resume=resume,
        trace=traced,
        heatmap=words,
    )
    journal, base_seed = None, secrets.randbelow(2**32)
    if prompts_file is not None:
        journal = Journal.open(settings.outdir)
        source = "-" if prompts_file == "-" else str(Path(prompts_file).resolve())
        earlier = journal.base_seed(source) if resume else None
        if earlier is None:
            journal.begin_run(source, base_seed)
        else:
            base_seed = earlier
    lines = swept(lines, axes, typed, base_seed=base_seed) if axes else lines
    counted: dict[str, Any] = {"num_images": num_images, "base_seed": base_seed}
    drawn = None if all_combinations else choices
    jobs = list(expand(lines, typed, registry, **counted, measure=_measure, lora_dir=lora_dir, wildcards=drawn))
    if not jobs:
        raise UsageError(f"no prompts in {prompts_file}")
    if dry_run:
        _print_requests(jobs, console)
    else:
        sheet = SweepSheet.of(jobs, axes, num_images=num_images) if axes else None
        _paint(jobs, registry, run, settings, journal, console, sheet=sheet, preview=preview, show=show)


def _words(text: str) -> tuple[str, ...]:
    """`all` is every word, as an empty tuple. Raises UsageError for no word."""
    words = tuple(dict.fromkeys(filter(None, (word.strip() for word in text.split(",")))))
    if not words:
        raise UsageError("--heatmap takes words of the prompt, such as fox,snow, or all")
    return () if text == "all" else words


def _lines(prompts: list[str], prompts_file: str | None, typed: dict[str, Any], registry: Registry) -> list[Line]:
    if prompts_file is not None:
        if prompts:
            raise UsageError("either prompts or --prompts-file, not both")
        return list(read_lines(prompts_file))
    if not prompts and "prompt" not in typed:
        kind = registry.find(typed.get("model")).kind
        if kind.conditioning == "class":
            raise UsageError(f"nothing to generate; name a class: {kind.listed_classes}")
        if kind.conditioning == "text":
            raise UsageError('nothing to generate; try: sdcli generate "an astronaut riding a horse"')
    return [Line(0, {"prompt": prompt}) for prompt in prompts] or [Line(0, {})]


def _with_choices(
    lines: list[Line], typed: dict[str, Any], axes: list[Axis], choices: Wildcards, *, all_combinations: bool
) -> list[Line]:
    """The lines, or all their combinations. Raises UsageError where there is nothing to choose in any of them."""
    if all_combinations and any(axis.field in DYNAMIC for axis in axes):
        raise UsageError("--all-combinations goes without a --sweep of prompts: both say which are painted")
    texts = [{**typed, **line.fields}.get(name) for line in lines for name in DYNAMIC]
    texts += [value for axis in axes if axis.field in DYNAMIC for value in axis.values]
    if not any(_may_choose(choices, text) for text in texts if isinstance(text, str)):
        raise UsageError("no prompt has a choice in it, as {red|blue} or __animals__, so that none would be made")
    return list(combinations(lines, typed, choices)) if all_combinations else lines


def _may_choose(choices: Wildcards, text: str) -> bool:
    """Whether a prompt has a choice in it; one that is malformed is told where its line is generated."""
    try:
        return choices.has_choices(text)
    except UsageError:
        return True


def _measure(start: ImageInput, cell: int) -> tuple[int, int]:
    """`input_images.measure`, which is imported only where there is an init image."""
    from sdcli.diffusion.input_images import measure

    return measure(start, cell)


def _print_requests(jobs: list[ResolvedJob | BadJob], console: Console) -> None:
    for job in jobs:
        if isinstance(job, BadJob):
            console.warn(str(job.error))
        else:
            fields = job.request.typed()
            console.result(json.dumps(fields, ensure_ascii=False), **fields)
    raise_for([job.error for job in jobs if isinstance(job, BadJob)], of=len(jobs))


def _paint(
    jobs: list[ResolvedJob | BadJob],
    registry: Registry,
    run: RunSettings,
    settings: OutputSettings,
    journal: Journal | None,
    console: Console,
    *,
    sheet: SweepSheet | None,
    preview: str | None,
    show: bool,
) -> None:
    """Paint what can be generated, and lay it out on the sheet of a sweep.

    What is wrong with a request or the folder, and what is not downloaded, is told before torch is imported.
    """
    alone = len(jobs) == 1
    preflight = Preflight(registry, settings)
    refusals = [preflight.refusal(job) for job in jobs]
    errors = [error for error in refusals if error is not None]
    good: list[ResolvedJob] = []
    for job, error in zip(jobs, refusals, strict=True):
        if error is not None:
            report_failure(job, error, console, alone=same_for_all(errors, of=len(jobs)))
        elif isinstance(job, ResolvedJob):
            good.append(job)
    if not good:
        raise_for(errors, of=len(jobs))
    check_output(settings)
    if preview is not None and Path(preview).resolve() in [path.resolve() for path in known_paths(settings)]:
        raise UsageError(f"--preview and -o name the same file, {preview}")
    if sheet is not None:
        try:
            sheet.check()
        except UsageError as error:
            console.warn(f"the sweep gets no sheet: {error}")
            sheet = None
    stop = GracefulStop(console).install()
    from sdcli.generation.engine import Engine, Note, Phase, Progress

    engine = Engine(registry, run, settings, stop=stop)
    renderable = best_renderable() if show else None
    paths: dict[int, Path] = {}
    with ProgressDisplay(console, images=preview == TERMINAL) as display:
        watched = None
        if preview is not None:
            watched = Preview(display.image if preview == TERMINAL else to_file(Path(preview)), warn=console.warn)
        for event in engine.generate_all(good, journal=journal):
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
                assert event.path is not None
                paths[event.job.index] = event.path
                if renderable is not None and event.status == "done":
                    from sdcli.images.image_files import open_image

                    display.show(renderable(open_image(event.path)))
    if sheet is not None and paths:
        sheet.write(paths, settings, console)
    raise_for(errors, of=len(jobs))
