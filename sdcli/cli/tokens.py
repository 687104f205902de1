"""`sdcli tokens`: show how a model reads a prompt, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sdcli.cli.options.shared import JsonOpt, ModelOpt, ModelsFileOpt
from sdcli.cli.ui.console import Console, printable
from sdcli.models.registry import load_registry
from sdcli.request.lora_tags import check_negative, take_tags
from sdcli.request.prompt_syntax import SubPrompt, subprompts
from sdcli.request.prompt_syntax import Text as PromptText
from sdcli.request.schema import parse_request

if TYPE_CHECKING:
    from rich.text import Text

    from sdcli.encoders.tokenizer import ClipTokenizer


def command(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Prompt.")],
    model: ModelOpt = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", metavar="TEXT", help="Negative prompt to show as well.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            help="Denoising steps, for prompts that change during them.",
            show_default="the model's own",
        ),
    ] = None,
    prompt_syntax: Annotated[
        Literal["a1111", "plain"] | None, typer.Option(help="Prompt syntax.", show_default="a1111")
    ] = None,
    models_file: ModelsFileOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Show how a model reads a prompt: tokens with weights, chunks, and the steps at which each text applies.

    Only the tokenizer of the model is loaded. The model's prompt template is applied.
    """
    spec = load_registry(models_file).find(model)
    spec.family.refuse("tokens", spec.name)
    typed = {"negative_prompt": negative_prompt, "steps": steps, "prompt_syntax": prompt_syntax}
    request = parse_request({"prompt": prompt, **typed})
    syntax = request.prompt_syntax or "a1111"
    check_negative(request.negative_prompt or "", syntax=syntax)
    request = request.changed(
        prompt=take_tags(request.prompt, syntax=syntax)[0],
        prompt_template=take_tags(spec.defaults.prompt_template, syntax=syntax)[0],
        steps=request.steps or spec.defaults.steps,
        prompt_syntax=syntax,
    )
    from sdcli.encoders.tokenizer import load_tokenizer
    from sdcli.models.hub.folders import tokenizer_folder

    tokenizer = load_tokenizer(tokenizer_folder(spec))
    read: dict[str, Any] = {"steps": request.steps, "syntax": request.prompt_syntax}
    rows = [("prompt", part) for part in subprompts(request.full_prompt, **read)]
    if negative_prompt is not None:
        rows += [("negative prompt", part) for part in subprompts(negative_prompt, compose=False, **read)]
    texts = [text for role, part in rows for text in _texts(role, part, tokenizer)]
    if as_json:
        for fields in texts:
            Console(json=True).result("", **fields)
    else:
        _show(texts, tokenizer.room)


def _texts(role: str, part: SubPrompt, tokenizer: ClipTokenizer) -> list[dict[str, Any]]:
    """Each text of a prompt with the steps at which it applies, as [first, last] of each range; JSON-ready."""
    stretches: dict[PromptText, list[list[int]]] = {}
    first = 1
    for last, text in part.texts:
        stretches.setdefault(text, []).append([first, last])
        first = last + 1
    return [
        {
            "role": role,
            "weight": part.weight,
            "steps": steps,
            "prompt": text.text,
            "chunks": [
                [
                    {"id": id, "token": tokenizer.spelled(id), "weight": weight}
                    for id, weight in zip(chunk.ids, chunk.weights, strict=True)
                ]
                for chunk in tokenizer.chunks(text)
            ],
            "cut": tokenizer(text.text).cut if text.plain else "",
        }
        for text, steps in stretches.items()
    ]


def _show(texts: list[dict[str, Any]], room: int) -> None:
    """Print the texts for people; in colour on a terminal, unless NO_COLOR is set."""
    from rich.console import Console as Terminal
    from rich.text import Text

    terminal = Terminal(highlight=False, soft_wrap=True)
    for fields in texts:
        count = sum(map(len, fields["chunks"]))
        head = [f"{fields['role']}: {count} token{'s' * (count != 1)}"]
        head += [f"weight {fields['weight']:g}"] if fields["weight"] != 1 else []
        stretches = [str(first) if first == last else f"{first}-{last}" for first, last in fields["steps"]]
        head += [f"steps {', '.join(stretches)}"]
        terminal.print(Text("; ".join(head), style="bold"))
        for number, chunk in enumerate(fields["chunks"], start=1):
            label = f"  chunk {number}, {len(chunk)} of {room}: "
            terminal.print(Text.assemble((label, "dim"), Text(" ").join(_word(token) for token in chunk)))
        if fields["cut"]:
            terminal.print(Text.assemble(("  cut: ", "dim"), (printable(fields["cut"]), "red")))


def _word(token: dict[str, Any]) -> Text:
    from rich.text import Text

    weight = token["weight"]
    style = "green" if weight > 1 else "yellow" if weight < 1 else ""
    more = f"*{weight:.3g}" if weight != 1 else ""
    return Text.assemble((printable(token["token"]) + more, style), (f"·{token['id']}", "dim"))
