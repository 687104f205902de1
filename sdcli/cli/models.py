"""`sdcli models`: list, download, verify, add and convert models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdcli.cli.options.shared import JsonOpt, ModelsFileOpt, OfflineOpt, OverwriteOpt, QuietOpt, VerboseOpt
from sdcli.cli.ui.console import Console
from sdcli.cli.ui.help import App
from sdcli.cli.ui.model_facts import cells, files_of, lines, local_path, lora_of, preset_of, summary, table
from sdcli.cli.ui.progress import ProgressBar
from sdcli.errors import BadWeights, NotFound, SdcliError, SomeFailed, UsageError
from sdcli.generation.settings import DType
from sdcli.models.families import DEFAULT_FAMILY, FAMILIES
from sdcli.models.preview_vae import PREVIEW_FILES, preview_source
from sdcli.models.registry import (
    ControlNetSpec,
    ModelSpec,
    Registry,
    load_registry,
    user_registry_file,
)
from sdcli.models.sources import HubFile, HubSource
from sdcli.request.schema import parse_size

if TYPE_CHECKING:
    from sdcli.models.hub.download import PullReport
    from sdcli.models.user_registry import Written

app = App(help="List, download, verify, add and convert models.")

NameArg = Annotated[
    str, typer.Argument(metavar="NAME", help="Name from `sdcli models list`, or owner/name[@revision].")
]
NamesArg = Annotated[
    list[str], typer.Argument(metavar="NAME...", help="Names from `sdcli models list`, or owner/name[@revision].")
]


@app.command("list")
def list_models(
    controlnets: Annotated[bool, typer.Option("--controlnets", help="List ControlNets instead.")] = False,
    models_file: ModelsFileOpt = None,
    json: JsonOpt = False,
) -> None:
    """List the models known by name; `*` marks the default."""
    console, registry = Console(json=json), load_registry(models_file)
    known = registry.controlnets if controlnets else registry.models
    rows = [summary(spec, registry) for spec in known.values()]
    if json:
        for row in rows:
            console.result("", **row)
        return
    heads = ("  name", "family", "where", "size", "licence", "description")
    for line in table([heads, *(cells(row) for row in rows)]):
        console.result(line)
    if any(not row["supported"] for row in rows):
        console.note("families in parentheses are not supported yet")


@app.command()
def show(name: NameArg, models_file: ModelsFileOpt = None, json: JsonOpt = False) -> None:
    """Print the facts of a model, and its files on this machine."""
    registry = load_registry(models_file)
    spec = registry.find_either(name)
    fields: dict[str, Any] = {
        **summary(spec, registry),
        "source": spec.source.model_dump(mode="json"),
        **(_facts_of_model(spec) if isinstance(spec, ModelSpec) else {}),
        "files": [{"file": path, "bytes": size} for path, size in files_of(spec)],
    }
    console = Console(json=json)
    if json:
        console.result("", **fields)
        return
    for line in lines(fields):
        console.result(line)


def _facts_of_model(spec: ModelSpec) -> dict[str, Any]:
    return {"defaults": spec.defaults.model_dump(mode="json"), **preset_of(spec), **lora_of(spec)}


@app.command()
def pull(
    names: NamesArg,
    safety_checker: Annotated[
        bool, typer.Option("--safety-checker", help="Also download the model's safety checker.")
    ] = False,
    fast: Annotated[bool, typer.Option("--fast", help="Also download the LoRA of the model's --fast preset.")] = False,
    preview_vae: Annotated[
        bool, typer.Option("--preview-vae", help="Also download the tiny autoencoder that previews are decoded with.")
    ] = False,
    models_file: ModelsFileOpt = None,
    offline: OfflineOpt = False,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Download models into the Hugging Face cache, and record their hashes.

    A NAME may also be a single file of the hub, hub:owner/name/file.safetensors, such as a LoRA.

    No other command uses the network, except for training on a data set of the hub. Only safetensors weights and small
    text files are downloaded. An interrupted download can be continued.
    """
    console, registry = Console(quiet=quiet, verbose=verbose, json=json), load_registry(models_file)

    def brought(name: str, download: Callable[..., PullReport]) -> None:
        from sdcli.io.files import megabytes

        with ProgressBar(console, sizes=True) as bar:
            bar.start(name)

            def progress(file: str, done: int, total: int) -> None:
                line = f"{name}: {100 * done // max(total, 1):3d} % of {megabytes(total)} ({file})"
                bar.update(done, total, line=line, description=f"{name} {file}")

            report = download(offline=offline, progress=progress)
        for path in report.changed:
            console.warn(f"{name}: {path} changed on the hub since the last pull")
        console.note(
            f"{name}: {report.files} {'file' if report.files == 1 else 'files'}, {megabytes(report.total_bytes)} "
            f"({megabytes(report.downloaded_bytes)} downloaded), commit {report.commit[:12]}"
        )
        if report.checker_left_out:
            console.note(f"{name} has a safety checker; --safety-checker downloads it too")
        console.result(
            report.folder,
            name=name,
            folder=str(report.folder),
            commit=report.commit,
            files=report.files,
            bytes=report.total_bytes,
            downloaded_bytes=report.downloaded_bytes,
            changed=list(report.changed),
        )

    def one(name: str) -> None:
        from sdcli.models.hub.download import pull as pull_from_hub
        from sdcli.models.hub.download import pull_files

        file = HubFile.of(name)
        if file is not None:
            brought(name, partial(pull_files, file.source, [file.file]))
            return
        spec = registry.find_either(name)
        more = list(_further_files(spec, fast=fast, preview_vae=preview_vae))
        if isinstance(spec.source, HubSource) or not more:
            brought(spec.name, partial(pull_from_hub, spec, safety_checker=safety_checker))
        for source, files in more:
            brought(source.repo, partial(pull_files, source, files))

    _each(names, one, console=console)


def _further_files(
    spec: ModelSpec | ControlNetSpec, *, fast: bool, preview_vae: bool
) -> Iterator[tuple[HubSource, list[str]]]:
    """The files of other repositories to download beside a model. Raises UsageError where it has none."""
    if fast:
        preset = spec.fast if isinstance(spec, ModelSpec) else None
        if preset is None or preset.lora is None:
            why = f"{preset.name} needs no LoRA" if preset is not None else "it has no few-step preset"
            raise UsageError(f"--fast: there is nothing to download for {spec.name}: {why}")
        if not isinstance(preset.lora.source, HubFile):
            raise UsageError(f"--fast: the LoRA of {spec.name} is on this machine, {preset.lora.source.path}")
        yield preset.lora.source.source, [preset.lora.source.file]
    if preview_vae:
        if spec.family.preview_vae is None:
            raise UsageError(f"--preview-vae: there is none for models of the {spec.family.name} family")
        yield preview_source(spec.family), list(PREVIEW_FILES)


@app.command()
def verify(
    names: NamesArg,
    models_file: ModelsFileOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Compare downloaded files with the hashes that `pull` recorded; exit 1 if any differs."""
    console, registry = Console(quiet=quiet, verbose=verbose, json=json), load_registry(models_file)

    def one(name: str) -> None:
        from sdcli.models.hub.manifest import verify as verify_in_cache

        spec = registry.find_either(name)
        report = verify_in_cache(spec)
        against = (
            "the recorded hashes" if report.recorded else "the hashes in the names of the cache (none were recorded)"
        )
        text = "\n".join(f"{spec.name}: {line}" for line in report.differences) or (
            f"{spec.name}: {report.files} files match {against}"
        )
        console.result(
            text,
            name=spec.name,
            ok=not report.differences,
            commit=report.commit,
            files=report.files,
            recorded=report.recorded,
            differences=list(report.differences),
        )
        if report.differences:
            raise BadWeights(
                f"{spec.name} is damaged; `sdcli models pull {spec.name}` downloads the differing files again"
            )

    _each(names, one, console=console)


@app.command()
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the model.")],
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Diffusers folder, .safetensors file, or owner/name[@revision].")
    ],
    description: Annotated[str, typer.Option(metavar="TEXT", help="Description, one line.")] = "",
    license: Annotated[str | None, typer.Option(metavar="TEXT", help="Licence.")] = None,
    family: Annotated[
        str, typer.Option(metavar="NAME", help=f"Family of the model: {', '.join(FAMILIES)}.")
    ] = DEFAULT_FAMILY.name,
    steps: Annotated[int | None, typer.Option(help="Default number of steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default guidance scale.")] = None,
    scheduler: Annotated[str | None, typer.Option(metavar="NAME", help="Default scheduler.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Default size in pixels.")] = None,
    prompt_template: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Template around every prompt: '{prompt}, glossy style'.")
    ] = None,
    dtype: Annotated[DType | None, typer.Option(help="Default number format.")] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of the repository.")
    ] = None,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Variant of the weight files, such as fp16.")
    ] = None,
    overwrite: OverwriteOpt = False,
) -> None:
    """Add a model with a name and defaults to your models file; nothing is downloaded."""
    from sdcli.models.user_registry import add_model, source_of

    defaults: dict[str, Any] = {
        "steps": steps,
        "guidance_scale": guidance_scale,
        "scheduler": scheduler,
        "prompt_template": prompt_template,
        "dtype": dtype,
    }
    if size is not None:
        defaults["width"], defaults["height"] = parse_size(size)
    typed = {key: value for key, value in defaults.items() if value is not None}
    entry: dict[str, Any] = {
        "description": description,
        "source": source_of(source, revision=revision, variant=variant),
        "family": family,
        **({"license": license} if license is not None else {}),
        **({"defaults": typed} if typed else {}),
    }
    _report_written(add_model(name, entry, overwrite=overwrite), f"added {name}")


@app.command()
def remove(
    name: NameArg,
    files: Annotated[bool, typer.Option("--files", help="Also delete its downloaded files.")] = False,
) -> None:
    """Remove a model from your models file, or with --files the downloaded files of any model."""
    from sdcli.models.user_registry import remove_model

    registry = load_registry()
    spec = registry.find_either(name)
    removable = name in registry.models and not _is_packaged(name)
    if not files or removable:
        _report_written(remove_model(name), f"removed {name}")
    if files:
        _delete_download(spec, registry, removed=removable)


@app.command()
def default(name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="New default model.")] = None) -> None:
    """Print the default model, or set it."""
    if name is None:
        Console().result(load_registry().default)
        return
    from sdcli.models.user_registry import set_default

    _report_written(set_default(name), f"{name} is now the default")


@app.command()
def path(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Model.")] = None,
    models_file: ModelsFileOpt = None,
) -> None:
    """Print the path of your models file, or of a model's files."""
    if name is None:
        Console().result(str(user_registry_file()))
        return
    spec = load_registry(models_file).find_either(name)
    folder = local_path(spec)
    if folder is None:
        raise UsageError(f"{spec.name!r} has no files: {spec.origin()}")
    if not folder.exists():
        raise NotFound(f"{spec.name!r} should be at {folder}, which does not exist")
    Console().result(str(folder))


@app.command("convert")
def convert_checkpoint(
    source: Annotated[
        Path, typer.Argument(metavar="IN.ckpt", help="Pickled checkpoint (.ckpt, .pt or .bin), or a folder of them.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT.safetensors", help="File to write; for a folder, a folder, or the same one.")
    ],
    overwrite: OverwriteOpt = False,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Time limit in seconds.")] = 600.0,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0.1, metavar="GB", show_default="2 + 4 x the size of the file", help="Memory limit in gigabytes."
        ),
    ] = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Convert a pickled checkpoint to safetensors, in a restricted process.

    A folder is converted with all pickles in it, their shards and index; OUT may be the same folder.
    """
    from sdcli.io.files import megabytes
    from sdcli.models.convert import Converted, convert

    console = Console(quiet=quiet, verbose=verbose, json=json)

    def report(done: Converted) -> None:
        if done.left_out:
            more = f" and {len(done.left_out) - 5} more" if len(done.left_out) > 5 else ""
            console.note(f"skipped entries other than weights: {', '.join(done.left_out[:5])}{more}")
        console.note(f"{done.tensors} tensors, {megabytes(done.total_bytes)}")
        console.result(str(done.file), file=str(done.file), tensors=done.tensors, bytes=done.total_bytes)

    if source.is_dir():
        from sdcli.models.convert_folder import convert_folder

        convert_folder(source, target, overwrite=overwrite, timeout_s=timeout, memory_gb=memory, report=report)
        return
    report(convert(source, target, overwrite=overwrite, timeout_s=timeout, memory_gb=memory))


def _is_packaged(name: str) -> bool:
    from sdcli.models.registry import packaged_registry_file, read_registry_file

    user = user_registry_file()
    in_user_file = user.exists() and name in read_registry_file(user)[1]
    return name in read_registry_file(packaged_registry_file())[1] and not in_user_file


def _delete_download(spec: ModelSpec | ControlNetSpec, registry: Registry, *, removed: bool) -> None:
    from sdcli.io.files import megabytes
    from sdcli.models.hub.manifest import delete_from_cache

    console = Console()
    if not isinstance(spec.source, HubSource):
        console.note(f"{spec.name} was not downloaded; its files are kept: {spec.origin()}")
        return
    others = [
        other.name
        for other in registry.models.values()
        if isinstance(other.source, HubSource) and other.source.repo == spec.source.repo and other.name != spec.name
    ]
    if removed and others:
        console.warn(f"the files of {spec.source.repo} are kept: {', '.join(others)} uses them too")
        return
    console.note(f"freed {megabytes(delete_from_cache(spec.source.repo))} ({spec.source.repo})")


def _report_written(written: Written, what: str) -> None:
    console = Console()
    if written.backup is not None:
        console.warn(f"comments of {written.file.name} were removed; the old file is kept as {written.backup}")
    console.note(what)
    console.result(str(written.file))


def _each(names: list[str], one: Callable[[str], None], *, console: Console) -> None:
    """Call `one` for each name; the failure of one of several is reported, and the others follow."""
    if len(names) == 1:
        one(names[0])
        return
    failed = []
    for name in names:
        try:
            one(name)
        except SdcliError as error:
            console.warn(str(error))
            failed.append(name)
    if failed:
        raise SomeFailed(f"{len(failed)} of {len(names)} models failed: {', '.join(failed)}")
