"""Sentences about the parts of a prompt or a LoRA that have no effect."""

from __future__ import annotations

from sdcli.diffusion.pipeline import Pipeline
from sdcli.encoders.textual_inversion import embedding_notes
from sdcli.errors import UsageError
from sdcli.models.loaded_model import LoadedModel
from sdcli.request.schema import ResolvedRequest


def prompt_notes(pipeline: Pipeline, request: ResolvedRequest, *, strict: bool) -> list[str]:
    """The ends of plain prompts that are cut, special tokens in prompts, and what is not taken over of embeddings.

    With `strict` a prompt that is cut raises UsageError instead.
    """
    tokenizer = pipeline.model.tokenizer
    if tokenizer is None:
        return []
    notes = embedding_notes(request.embeddings, encoders=pipeline.model.parts)
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
    """What is not taken over of a model's LoRAs, such as tensors that fit none of its layers."""
    notes = [f"{one.ref.path}: {note}" for one in model.loras for note in one.notes]
    return notes + [
        f"{one.ref.path}: {len(one.unmatched)} of its names have no place in {model.spec.name} and no effect, first "
        f"{one.unmatched[0]} ({one.layers} layers do)"
        for one in model.loras
        if one.unmatched
    ]
