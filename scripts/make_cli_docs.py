"""Write docs/cli.md, the reference of every command and option, from the Typer app itself."""

from __future__ import annotations

import argparse
import difflib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from sdcli.cli.app import app
from sdcli.cli.ui.help import command_sections, option_sections
from sdcli.errors import EXIT_CODES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when docs/cli.md is stale")
    text = "\n".join(page()) + "\n"
    if not parser.parse_args().check:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text, encoding="utf-8")
        return
    written = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if written != text:
        sys.stderr.writelines(
            difflib.unified_diff(written.splitlines(True), text.splitlines(True), "docs/cli.md", "app")
        )
        sys.exit("docs/cli.md is stale; python scripts/make_cli_docs.py writes it")


def page() -> Iterator[str]:
    """The lines of docs/cli.md."""
    root = typer.main.get_command(app)
    yield "# The command line"
    yield ""
    yield "Written by `scripts/make_cli_docs.py` from the commands themselves; do not edit."
    yield ""
    yield from section(root, "sdcli")
    yield "## Exit codes"
    yield ""
    yield "| code | meaning |"
    yield "| ---: | --- |"
    for code, meaning in EXIT_CODES.items():
        yield f"| {code} | {meaning} |"


def section(command: Any, path: str, *, parent: Any = None) -> Iterator[str]:
    """A command's usage, help and options, then those of its sub-commands."""
    context = command.make_context(path, [], parent=parent, resilient_parsing=True)
    yield f"## {path}"
    yield ""
    yield "```"
    yield " ".join([path, *command.collect_usage_pieces(context)])
    yield "```"
    yield ""
    if command.help:
        yield inspect.cleandoc(command.help).replace("\b", "")
        yield ""
    children: dict[str, Any] = getattr(command, "commands", {})
    for heading, rows in command_sections(command).items() if children else ():
        yield f"| {heading} | |"
        yield "| --- | --- |"
        for name, text in rows:
            yield f"| [{path} {name}](#{anchor(path, name)}) | {cell(text)} |"
        yield ""
    for heading, rows in option_sections(command, context).items():
        yield f"| {heading} | |"
        yield "| --- | --- |"
        for name, text in rows:
            yield f"| `{cell(name)}` | {cell(text)} |"
        yield ""
    for name, child in children.items():
        yield from section(child, f"{path} {name}", parent=context)


def anchor(*path: str) -> str:
    return " ".join(path).replace(" ", "-").lower()


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
