"""`sdcli serve`: generate images over HTTP with models that stay loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from sdcli.cli.options.shared import DTypeOpt, ModelsFileOpt, OfflineOpt
from sdcli.errors import NotFound, UsageError
from sdcli.generation.settings import RunSettings
from sdcli.models.registry import load_registry
from sdcli.request.fields import EmbeddingRef

TOKEN_VARIABLE = "SDCLI_SERVER_TOKEN"


def command(
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; others than this machine's need a token.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 7860,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", metavar="NAME", help="Load this model at once; others when they are requested."),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", help="Device of a worker, such as cuda:0 (several: several workers), or cpu:2."),
    ] = None,
    dtype: DTypeOpt = "auto",
    max_queue: Annotated[int, typer.Option("--max-queue", min=1, help="Jobs that may wait.")] = 64,
    max_images: Annotated[int, typer.Option("--max-images", min=1, help="Images of one job.")] = 16,
    max_pixels: Annotated[int, typer.Option("--max-pixels", min=64, help="Pixels of one image.")] = 2048 * 2048,
    max_body: Annotated[int, typer.Option("--max-body", min=1024, help="Bytes of a request.")] = 32 * 1024 * 1024,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="Longest time that a job may run.")
    ] = None,
    batch_wait: Annotated[
        float,
        typer.Option(
            "--batch-wait",
            min=0,
            max=60_000,
            metavar="MS",
            help="Time for jobs of one shape to come together in a batch, which can change the last bits of an image.",
        ),
    ] = 0.0,
    keep: Annotated[
        float, typer.Option("--keep", min=0, metavar="SECONDS", help="Time in which finished images can be fetched.")
    ] = 900.0,
    max_kept: Annotated[
        int, typer.Option("--max-kept", min=1024, help="Bytes of finished images; above it the oldest go sooner.")
    ] = 256 * 1024 * 1024,
    idle_unload: Annotated[
        float | None,
        typer.Option("--idle-unload", min=0, metavar="SECONDS", help="Unload models after this time without a job."),
    ] = None,
    lora_dir: Annotated[
        Path | None, typer.Option("--lora-dir", metavar="DIR", help="Folder of the LoRAs that requests may name.")
    ] = None,
    embedding: Annotated[
        list[str] | None,
        typer.Option("--embedding", metavar="FILE[=WORD]", help="Textual inversion that requests name by its word."),
    ] = None,
    grace: Annotated[
        float, typer.Option("--grace", min=0, metavar="SECONDS", help="Time for running jobs after SIGTERM.")
    ] = 30.0,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", metavar="FILE", help=f"Clients need this token (or set {TOKEN_VARIABLE})."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", metavar="ORIGIN", help="Let web pages of this address use the server."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", metavar="NAME", help="Another name under which clients reach the server."),
    ] = None,
    log: Annotated[Literal["text", "json"], typer.Option("--log", help="Form of the log lines on stderr.")] = "text",
    models_file: ModelsFileOpt = None,
    offline: OfflineOpt = False,
) -> None:
    """Generate images over HTTP with models that stay loaded.

    Only this machine reaches the server unless --host says otherwise, which needs a token. Requests can use the models
    of `sdcli models list` and the LoRAs of the LoRA folder by their names, and never name files of this machine.
    """
    from sdcli.server.run import run_server
    from sdcli.server.settings import ServerSettings

    settings = ServerSettings(
        host=host,
        port=port,
        devices=tuple(device or ["auto"]),
        run=RunSettings(dtype=dtype, offline=offline, lora_dir=lora_dir),
        embeddings=tuple(_embedding(text) for text in embedding or ()),
        preload=tuple(model or ()),
        max_queue=max_queue,
        max_images=max_images,
        max_pixels=max_pixels,
        max_body=max_body,
        timeout=timeout,
        batch_wait=batch_wait / 1000,
        keep=keep,
        max_kept=max_kept,
        idle_unload=idle_unload,
        grace=grace,
        token=_token(token_file),
        origins=tuple(allow_origin or ()),
        hosts=tuple(allow_host or ()),
        log=log,
    )
    settings.check()
    run_server(settings, load_registry(models_file))


def _embedding(text: str) -> EmbeddingRef:
    """FILE or FILE=WORD. Raises NotFound for a file that is not there."""
    ref = EmbeddingRef.model_validate(EmbeddingRef.pieces(text))
    if not Path(ref.path).is_file():
        raise NotFound(f"--embedding {text}: no file {ref.path}")
    return ref


def _token(file: Path | None) -> str | None:
    """The token of a file, or of the environment; a file is not readable by others. Raises UsageError and NotFound."""
    if file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        text = file.read_text(encoding="utf-8").strip()
        readable = os.name == "posix" and file.stat().st_mode & 0o077
    except (OSError, UnicodeDecodeError) as error:
        raise NotFound(f"--token-file {file}: cannot be read: {error}") from None
    if not text or len(text.split()) != 1:
        raise UsageError(f"--token-file {file}: should hold one word, the token")
    if readable:
        raise UsageError(f"--token-file {file}: other users can read it; chmod 600 {file}")
    return text
