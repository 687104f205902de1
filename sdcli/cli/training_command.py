"""The shared part of the training commands: options, processes, signals, display, and --prove-resume."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar, get_args

import typer

from sdcli.cli.options.flags import Command, Flag, field_options
from sdcli.cli.options.shared import JsonOpt, ModelsFileOpt, QuietOpt, VerboseOpt
from sdcli.cli.ui.console import Console
from sdcli.cli.ui.streams import ReaderGone
from sdcli.cli.ui.training_signals import TrainingStop
from sdcli.errors import BadOutput, CannotWrite, Interrupted, SdcliError, UsageError
from sdcli.io.files import expanded, lies_inside, refuse_inside
from sdcli.models.registry import Registry, load_registry
from sdcli.training.config_files import read_config, validated
from sdcli.training.settings import DATA, KEEP, MACHINE, MODEL, OBJECTIVE, OPTIMIZER, SHAPE, STEPS, WATCH, TrainSettings

if TYPE_CHECKING:
    from sdcli.training.events import Event
    from sdcli.training.session import Session

S = TypeVar("S", bound=TrainSettings)

OutputRunOpt = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="RUN", help="Folder of the run, and of the model that it trains."),
]
ConfigOpt = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Read settings from a .toml or .yaml file; options take precedence."),
]
ResumeOpt = Annotated[
    bool, typer.Option("--resume", help="Continue from the newest complete checkpoint in RUN, as if never stopped.")
]
DryRunOpt = Annotated[bool, typer.Option("--dry-run", help="Examine data and settings, print the plan, and stop.")]
ProveOpt = Annotated[
    bool,
    typer.Option(
        "--prove-resume",
        help="Check that resuming is exact: compare 10 steps with 5 + kill -9 + 5 resumed, in temporary folders.",
    ),
]


METAVARS = {
    **dict.fromkeys(("model", "vae", "text_encoder", "controlnet"), "MODEL"),
    **dict.fromkeys(("image_column", "caption_column", "conditioning_image_column"), "NAME"),
    **dict.fromkeys(("cache_dir", "conditioning_data_dir"), "DIR"),
    **dict.fromkeys(("bucket_reso_steps", "min_bucket_reso", "max_bucket_reso"), "PIXELS"),
    "from_scratch": "CONFIG",
    "caption_extension": ".EXT",
    "resolution": "N|WxH",
    "report_to": "tensorboard|wandb",
    "max_hours": "HOURS",
    "objective": "NAME[:WEIGHT]",
    "lora_targets": "LAYER",
    "sample_prompts": "PROMPT",
    "lpips": "FILE",
}
"""Setting -> placeholder of its value, where the type does not say enough."""
SECTIONS = (DATA, SHAPE, MODEL, STEPS, OPTIMIZER, OBJECTIVE, KEEP, WATCH, MACHINE)
SIGNALS = """Signals: SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR2 finish the step, save a checkpoint and end the run
(exit code 130 for SIGINT, else 143); SIGUSR1 saves and the run goes on. A second SIGINT or SIGTERM ends it at once."""
ECHO = 0.5
"""Seconds within which a repeated signal counts once: terminal and launcher both send it to every process."""


@dataclass(frozen=True)
class TrainingCommand(Generic[S]):
    """One training command: its name, its settings, and a function that opens its session (with heavy imports)."""

    name: str
    kind: type[S]
    open_session: Callable[[str, Path, S, Registry], Session[S]]
    data_metavar: str
    data_help: str

    def command(self, help_text: str) -> Callable[..., None]:
        """The Typer command: its argument, the options of all trainers, and an option per setting."""

        def command(
            data: str | None = None,
            output: OutputRunOpt = None,
            config: ConfigOpt = None,
            resume: ResumeOpt = False,
            dry_run: DryRunOpt = False,
            prove_resume: ProveOpt = False,
            models_file: ModelsFileOpt = None,
            as_json: JsonOpt = False,
            quiet: QuietOpt = False,
            verbose: VerboseOpt = False,
            *,
            typed: dict[str, Any],
        ) -> None:
            registry = load_registry(models_file)
            call = TrainingCall(data, output, config, resume, dry_run, prove_resume, typed, registry, models_file)
            train(self, call, Console(quiet=quiet, verbose=verbose, json=as_json))

        argument = typer.Argument(metavar=self.data_metavar, help=self.data_help, show_default=False)
        command.__annotations__["data"] = Annotated[str | None, argument]
        command.__doc__ = f"{help_text.rstrip()}\n\n{SIGNALS}\n"
        return settings_options(self.kind)(command)


def settings_options(kind: type[TrainSettings]) -> Callable[[Command], Command]:
    """Give a command one option per setting; the typed values arrive as the keyword `typed`, a dict."""

    def flag(name: str) -> Flag:
        info = kind.model_fields[name]
        extra: Any = info.json_schema_extra
        names = (f"--{name.replace('_', '-')}", *extra["also"])
        if bool in (info.annotation, *get_args(info.annotation)):
            names = tuple(f"{one}/--no-{one[2:]}" for one in names)
        return Flag((*names, *(["-m"] if name == "model" else [])), extra["panel"], METAVARS.get(name))

    return field_options(kind, {name: flag(name) for name in kind.model_fields}, sections=SECTIONS)


@dataclass(frozen=True)
class TrainingCall:
    """The command line of one training command, parsed."""

    data: str | None
    output: Path | None
    config: Path | None
    resume: bool
    dry_run: bool
    prove_resume: bool
    typed: dict[str, Any]
    registry: Registry
    models_file: Path | None = None


def train(trainer: TrainingCommand[S], call: TrainingCall, console: Console) -> None:
    """Run one training command."""
    data, run, settings = _resolved(trainer, call)
    unnamed = call.output is None and (call.dry_run or call.prove_resume)  # RUN is only a stand-in
    if call.prove_resume:
        _refuse_inside(data, None if unnamed else run, settings)
        _prove_resume(trainer.name, data, run, settings, call.models_file, console)
        return
    from sdcli.training.launch import inside_a_launch, launch
    from sdcli.training.run_folder import check_free

    if not call.resume and not inside_a_launch():
        if not unnamed:
            check_free(run)
        _refuse_inside(data, None if unnamed else run, settings)
    if (settings.num_processes or 1) > 1 and not inside_a_launch():
        code = launch(sys.argv[1:], processes=settings.num_processes or 1)
        if code:
            raise _AlreadyPrinted(code)
        return
    stop = TrainingStop(
        console,
        kept="complete checkpoints are kept" if not call.dry_run else "nothing was changed",
        echo=ECHO if inside_a_launch() else 0.0,
    ).install()
    with ExitStack() as stack:
        session = trainer.open_session(data, run, settings, call.registry)
        stack.enter_context(session)
        if not session.is_main:
            console = dataclasses.replace(console, quiet=True)
        from sdcli.cli.ui.training_progress import TrainingProgress

        display = stack.enter_context(TrainingProgress(console))
        lost: list[CannotWrite | ReaderGone] = []
        for event in session.prepare(resume=call.resume, stop=stop):
            display.report(event)
        for line in session.plan_lines(devices=call.dry_run):
            console.note(line)
        if call.dry_run:
            if session.is_main:
                console.result(json.dumps(session.plan()), **session.plan())
            return
        try:
            for event in session.train(stop=stop, save=stop.save):
                display.report(event)
                if session.is_main:
                    try:
                        _report(event, console)
                    except (CannotWrite, ReaderGone) as error:  # a full disk or a reader that has gone ends no run
                        lost.append(error)
        except Interrupted as stopped:
            raise stopped if session.is_main else type(stopped)("") from None  # the main process prints the reason
    if session.is_main:
        if lost and isinstance(lost[0], CannotWrite):
            raise CannotWrite(f"{lost[0]}; the run in {run} is complete")
        console.result(run, status="done", run=str(run))


def _refuse_inside(data: str, run: Path | None, settings: TrainSettings) -> None:
    """Refuse to write among the images: sample sheets would be trained on, and a resumed run would find other data."""
    if run is not None:
        refuse_inside(run, data, choose="another -o")
    cache_dir: Path | None = getattr(settings, "cache_dir", None)
    if cache_dir is not None:
        refuse_inside(cache_dir, data, choose="another --cache-dir")


class _AlreadyPrinted(SdcliError):
    """A failure that another process of this run has printed; only its exit code is passed on."""

    def __init__(self, code: int) -> None:
        super().__init__("")
        self.exit_code = code


def _resolved(trainer: TrainingCommand[S], call: TrainingCall) -> tuple[str, Path, S]:
    from sdcli.training.run_folder import recorded, with_recorded_precision

    typed = dict(call.typed)
    given = read_config(call.config, trainer.kind) if call.config is not None else {}
    data = call.data if call.data is not None else given.pop("data", None)
    output = call.output if call.output is not None else given.pop("output", None)
    given = {name: value for name, value in given.items() if name in trainer.kind.model_fields}
    if output is None:
        if call.prove_resume or call.dry_run:
            output = "run"
        else:
            raise UsageError("-o RUN is missing, the folder of the run")
    run = expanded(output)
    before: dict[str, Any] = {}
    if call.resume:
        begun_with, before = recorded(run, command=trainer.name, kind=trainer.kind)
        data = data if data is not None else begun_with
    if data is None:
        raise UsageError(f"nothing to train on; try: sdcli {trainer.name} DATA -o {output}")
    values = with_recorded_precision(_over(_over(before, given), typed), before)
    settings = validated(trainer.kind, values, file=call.config, of_file=given.keys() - typed.keys())
    return str(data), run, settings


def _over(values: dict[str, Any], newer: dict[str, Any]) -> dict[str, Any]:
    """Newer values over older ones; a newer limit (steps, epochs) replaces an older one of the other kind."""
    limits = {"max_train_steps", "num_train_epochs"}
    replaced = limits if limits & set(newer) else set()
    return {**{name: value for name, value in values.items() if name not in replaced}, **newer}


def _report(event: Event, console: Console) -> None:
    """Print checkpoints and samples on stdout; with --json every event."""
    from sdcli.training.events import CheckpointSaved, Preparation, SamplesSaved
    from sdcli.training.run_log import strict_json

    if console.json:
        if not isinstance(event, Preparation):
            console.result("", event=type(event).__name__.lower(), **strict_json(dataclasses.asdict(event)))
    elif isinstance(event, CheckpointSaved):
        console.result(event.path)
    elif isinstance(event, SamplesSaved):
        for path in event.paths:
            console.result(path)


# --prove-resume

PROOF_STEPS = 5


def _prove_resume(
    name: str, data: str, run: Path, settings: TrainSettings, models_file: Path | None, console: Console
) -> None:
    """Compare an uninterrupted run with a killed and resumed one, with the user's settings, in temporary folders."""
    beside = run.parent.is_dir() and not lies_inside(run.parent, data)
    parent = run.parent if beside else Path(tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix=".sdcli-prove-", dir=parent))
    try:
        limits = {"max_train_steps": 2 * PROOF_STEPS, "num_train_epochs": None, "max_hours": None}
        never = 10**9
        every = {"checkpointing_steps": PROOF_STEPS, "sample_every_n_steps": never, "checkpoints_total_limit": None}
        chosen = settings.model_copy(update={**limits, **every})
        import yaml

        values = {k: v for k, v in chosen.model_dump(mode="json").items() if v is not None}
        config = folder / "settings.yaml"
        config.write_text(
            yaml.safe_dump({"data": str(Path(data).absolute()) if Path(data).exists() else data, **values})
        )
        command = [sys.executable, "-m", "sdcli", name, "--config", str(config), "--quiet"]
        command += ["--models-file", str(models_file)] if models_file is not None else []
        straight, resumed = folder / "straight", folder / "resumed"
        console.note(f"training {2 * PROOF_STEPS} steps without interruption")
        _finish(subprocess.run([*command, "-o", str(straight)], stdout=subprocess.DEVNULL), "the uninterrupted run")
        console.note(f"training {PROOF_STEPS} steps, then kill -9")
        _kill_after_first_checkpoint([*command, "-o", str(resumed)])
        console.note("resuming")
        _finish(
            subprocess.run([*command, "-o", str(resumed), "--resume"], stdout=subprocess.DEVNULL), "the resumed run"
        )
        last = f"checkpoint-{2 * PROOF_STEPS}"
        differences = _differences(straight / last, resumed / last)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if differences:
        raise BadOutput(f"the resumed run differs from the uninterrupted one in {', '.join(differences)}")
    console.result(
        f"identical: {2 * PROOF_STEPS} steps at once, and {PROOF_STEPS} + kill -9 + {PROOF_STEPS} resumed, "
        "gave the same bytes",
        status="identical",
        steps=2 * PROOF_STEPS,
    )


def _finish(process: subprocess.CompletedProcess[bytes], what: str) -> None:
    if process.returncode:
        raise SdcliError(f"{what} ended with exit code {process.returncode}; see above")


def _kill_after_first_checkpoint(command: list[str]) -> None:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    try:
        line = next((line for line in process.stdout if b"checkpoint-" in line), None)
        if line is None:
            _finish(subprocess.CompletedProcess(command, process.wait() or 1), "the run to be killed")
    finally:  # also after Ctrl-C, which does not reach a process of another session
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _differences(one: Path, other: Path) -> list[str]:
    """The names of files that differ between two checkpoints, by the digests in their manifests."""
    files = [json.loads((folder / "manifest.json").read_text())["files"] for folder in (one, other)]
    return sorted(name for name in {*files[0], *files[1]} if files[0].get(name) != files[1].get(name))
