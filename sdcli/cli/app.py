"""The table of commands, and the one place where errors become a sentence and an exit code."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, NoReturn

import typer

from sdcli import __version__
from sdcli.cli.ui.console import printable
from sdcli.cli.ui.help import WIDEST, App, Group
from sdcli.cli.ui.streams import ReaderGone, in_utf8_mode, prepare_streams
from sdcli.errors import EXIT_CODES, CannotWrite, Interrupted, SdcliError, Terminated
from sdcli.io.threads import wait_without_spinning

COMMANDS = {
    "generate": ("Generate", "Generate images, and print the path of each as soon as it is written."),
    "tokens": (
        "Generate",
        "Show how a model reads a prompt: tokens with weights, chunks, and the steps at which each text applies.",
    ),
    "train-unet": ("Train", "Train or fine-tune a UNet, or a LoRA for it, on captioned images."),
    "train-controlnet": (
        "Train",
        "Train a ControlNet, which guides a model by maps of edges, strokes, depth and the like.",
    ),
    "train-vae": ("Train", "Train or fine-tune a VAE on images without captions, for `train-unet --vae RUN`."),
    "train-text-encoder": (
        "Train",
        "Train a small text encoder on captions, for `train-unet --text-encoder RUN`.",
    ),
    "plot": ("Train", "Draw the curves of training runs, and print the path of the figure."),
    "encode": ("Latents", "Encode images to latents, in .safetensors files that ComfyUI reads too."),
    "decode": ("Latents", "Decode latents to images, and print the path of each as soon as it is written."),
    "noise": (
        "Latents",
        "Show the forward process of a model: an image with the noise of chosen training timesteps.",
    ),
    "info": (
        "Images",
        "Print the settings stored in images by sdcli, A1111, ComfyUI, InvokeAI and other tools (docs/interop.md).",
    ),
    "control-map": ("Images", "Write the map that `generate --control HOW:MODEL=IMAGE` passes to a ControlNet."),
    "compare": ("Images", "Measure how much two images differ, and list the differences of their settings."),
    "grid": ("Images", "Lay images out on a contact sheet with labels, and print its path."),
    "gallery": (
        "Images",
        "Write an HTML page that shows the images of a folder with their settings, and print its path.",
    ),
    "selftest": (
        "Models",
        "Check every step of generation with a tiny model, offline, in seconds, and print devices and versions.",
    ),
    "dataset": (
        "Train",
        "Examine training images before training, cache their latents, and pack them into shards.",
    ),
    "models": ("Models", "List, download, verify, add and convert models."),
    "serve": ("Server", "Generate images over HTTP with models that stay loaded."),
}
"""Command -> its section of `sdcli --help`, and the first paragraph of its own help: the list imports no command.

Its module has the same name, with _ for -.
"""

COLLECT_AFTER = (50_000, 20, 20)
"""Thresholds of gc; with the default of 700 it runs hundreds of times while torch is imported."""

_EXITS = " ".join(
    f"{code} {meaning.split(':')[0].split(';')[0].split('(')[0].strip()}," for code, meaning in EXIT_CODES.items()
)


class _Commands(Mapping[str, Any]):
    """The commands by name; the module of each is imported when it is looked up."""

    def __getitem__(self, name: str) -> Any:
        return typer.main.get_group(_app_with(name)).commands[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Root(Group):
    """The group of all commands, which imports only those that are used."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = _Commands()  # type: ignore[assignment]  # nothing is added to them

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def sections(self) -> dict[str, list[tuple[str, str]]]:
        found: dict[str, list[tuple[str, str]]] = {}
        for name, (section, summary) in COMMANDS.items():
            found.setdefault(section, []).append((name, summary))
        return found


@cache
def _app_with(name: str) -> App:
    """An app with this command alone. Raises KeyError for a name that is none."""
    section, _ = COMMANDS[name]
    gc.set_threshold(*COLLECT_AFTER)
    wait_without_spinning()
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # it would search all installed packages
    module = importlib.import_module(f"sdcli.cli.{name.replace('-', '_')}")
    if name == "dataset":  # not in that module, as it imports options from it
        from sdcli.cli import dataset_cache

        module.app.command("cache")(dataset_cache.command)
    one = App(pretty_exceptions_enable=False)
    if hasattr(module, "app"):
        one.add_typer(module.app, name=name, rich_help_panel=section)
    else:
        one.command(name, rich_help_panel=section)(module.command)
    return one


app = App(
    cls=_Root,
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
