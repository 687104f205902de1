"""Sentences about the parts of a prompt or a LoRA that have no effect."""

from __future__ import annotations

from sdcli.diffusion.pipeline import Pipeline
from sdcli.errors import UsageError
from sdcli.models.loaded_model import LoadedModel
from sdcli.request.schema import ResolvedRequest


def prompt_notes(pipeline: Pipeline, request: ResolvedRequest, *, strict: bool) -> list[str]:
    """The ends of plain prompts that are cut, and special tokens that a prompt spells out.

    With `strict` a prompt that is cut raises UsageError instead.
    """
    tokenizer = pipeline.model.tokenizer
    if tokenizer is None:
        return []
    notes = []
    for kind, text in (("prompt", request.full_prompt), ("negative prompt", request.negative_prompt)):
        tokens = tokenizer(text)
        if tokens.cut and request.prompt_syntax == "plain":
            cut = tokens.cut if len(tokens.cut) <= 100 else f"{tokens.cut[:60]} ... {tokens.cut[-30:]}"
            problem = f"the {kind} has {tokens.count} tokens, {tokenizer.room} fit; cut: {cut!r}"
            if strict:
                raise UsageError(problem)
            notes.append(problem)
        if "<|endoftext|>" in text or "<|startoftext|>" in text:
            notes.append(f"the {kind} spells a special token of CLIP; what follows it may have no effect")
    return notes


def lora_notes(model: LoadedModel) -> list[str]:
    """The tensors of a model's LoRAs that fit none of its layers."""
    return [
        f"{one.ref.path}: {len(one.unmatched)} of its names have no place in {model.spec.name} and no effect, first "
        f"{one.unmatched[0]} ({one.layers} layers do)"
        for one in model.loras
        if one.unmatched
    ]
