"""The table of commands, and the one place where errors become a sentence and an exit code."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from sdcli import __version__
from sdcli.cli.ui.console import printable
from sdcli.cli.ui.help import WIDEST, App
from sdcli.cli.ui.streams import ReaderGone, in_utf8_mode, prepare_streams
from sdcli.errors import EXIT_CODES, CannotWrite, Interrupted, SdcliError, Terminated

COMMANDS = {
    "generate": "Generate",
    "tokens": "Generate",
    "train-unet": "Train",
    "train-controlnet": "Train",
    "train-vae": "Train",
    "train-text-encoder": "Train",
    "dataset": "Train",
    "plot": "Train",
    "encode": "Latents",
    "decode": "Latents",
    "noise": "Latents",
    "info": "Images",
    "control-map": "Images",
    "compare": "Images",
    "grid": "Images",
    "gallery": "Images",
    "models": "Models",
    "selftest": "Models",
    "serve": "Server",
}
"""Command -> its section of `sdcli --help`. Its module has the same name, with _ for -."""

COLLECT_AFTER = (50_000, 20, 20)
"""Thresholds of gc; with the default of 700 it runs hundreds of times while torch is imported."""

_EXITS = " ".join(
    f"{code} {meaning.split(':')[0].split(';')[0].split('(')[0].strip()}," for code, meaning in EXIT_CODES.items()
)

app = App(
    name="sdcli",
    help="Generate images from text with latent diffusion models, and train such models.",
    epilog=f"Exit codes: {_EXITS.rstrip(',')}.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDEST},
)


def _version(value: bool) -> None:
    if value:
        print(f"sdcli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def _load(arguments: list[str]) -> None:
    """Import the module of the typed command, or of all commands if there is none (for --help)."""
    if arguments[1:] == ["--version"]:
        return
    gc.set_threshold(*COLLECT_AFTER)
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # it would search all installed packages
    typed = {name for name in arguments[1:2] if name in COMMANDS}
    for name in typed or COMMANDS:
        module = importlib.import_module(f"sdcli.cli.{name.replace('-', '_')}")
        if name == "dataset":  # not in that module, as it imports options from it
            from sdcli.cli import dataset_cache

            module.app.command("cache")(dataset_cache.command)
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name, rich_help_panel=COMMANDS[name])
        else:
            app.command(name, rich_help_panel=COMMANDS[name])(module.command)


_load(sys.argv)


def main() -> NoReturn:
    """Run the command line, and exit with a code of `errors.EXIT_CODES`."""
    in_utf8_mode()
    prepare_streams()
    _raise_on_signals()
    verbose = bool({"-v", "--verbose"} & set(sys.argv))
    try:
        code = _run()
        sys.stdout.flush()
    except (SdcliError, Interrupted) as error:
        if str(error):  # empty: another process of this run has printed it, or nobody reads on
            _print_error(str(error), verbose)
        _exit(error.exit_code)
    except Exception as error:
        hint = "" if verbose else " (-v shows where)"
        _print_error(f"unexpected {type(error).__name__}: {error}{hint}", verbose)
        _exit(1)
    _exit(code)


def _run() -> int:
    """Run Typer's app, which ends with SystemExit, and return the exit code."""
    try:
        app()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    return 0


def _print_error(sentence: str, verbose: bool) -> None:
    if verbose:
        traceback.print_exc()
    print(f"sdcli: {printable(sentence)}", file=sys.stderr, flush=True)


def _raise_on_signals() -> None:
    def interrupted(*_: object) -> NoReturn:
        raise Interrupted("interrupted")

    def terminated(*_: object) -> NoReturn:
        raise Terminated("terminated")

    signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGTERM, terminated)


def _exit(code: int) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a signal during shutdown must not change the code
    with contextlib.suppress(CannotWrite, ReaderGone):  # the code says already that something failed
        sys.stdout.flush()
    gc.freeze()  # saves a last garbage collection
    sys.exit(code)
