"""Settings of `sdcli train-text-encoder`, in addition to those that all trainers share."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import model_validator

from sdcli.training.settings import DATA, MODEL, OBJECTIVE, FixedPrecision, TrainSettings, fixed_precision, setting


class TextSettings(TrainSettings):
    """Settings of `sdcli train-text-encoder`."""

    mixed_precision: FixedPrecision = fixed_precision()

    caption_column: str | None = setting(None, "column with the caption (default: text or caption)", DATA)
    caption_extension: str = setting(".txt", "extension of the caption files next to images", DATA)
    split: str = setting("train", "split to use, of a data set with several", DATA)
    validation_split: float = setting(0.05, "share of captions held out for validation", DATA, ge=0, lt=1)
    cache_dir: Path | None = setting(None, "folder for the teacher's vectors (default: your cache folder)", DATA)

    model: str | None = setting(
        None, "model whose text encoder and vocabulary to fine-tune (default: a new text encoder)", MODEL
    )
    vocab_size: int = setting(8192, "size of the vocabulary learned from the captions, in tokens", MODEL, ge=514)
    max_length: int = setting(32, "maximum length of a caption in tokens, with start and end", MODEL, ge=3, le=77)
    hidden_size: int = setting(256, "width of the network", MODEL, ge=8)
    num_hidden_layers: int = setting(4, "number of layers", MODEL, ge=1)
    num_attention_heads: int = setting(4, "number of attention heads", MODEL, ge=1)
    intermediate_size: int | None = setting(
        None, "width of the feed-forward layers (default: 4 times --hidden-size)", MODEL, ge=8
    )

    objective: tuple[str, ...] = setting(
        (),
        "distil: learn the vectors of --teacher; align: teach the encoder of --model the states of an image's first "
        "caption for its other captions; with a weight as align:0.2; repeatable (default: distil)",
        OBJECTIVE,
    )
    teacher: Path | None = setting(
        None, "for distil: folder of a sentence encoder, or a .safetensors or .npz file of vectors", OBJECTIVE
    )
    word_dropout: float = setting(0.0, "share of words that distil leaves out of captions", OBJECTIVE, ge=0, lt=1)
    temperature: float = setting(0.05, "temperature of distil's InfoNCE term", OBJECTIVE, gt=0)

    @model_validator(mode="after")
    def _every_text_setting_has_an_effect(self) -> Self:
        if self.gradient_checkpointing or self.channels_last:
            raise ValueError(
                f"--{'gradient-checkpointing' if self.gradient_checkpointing else 'channels-last'} has no effect on a "
                "text encoder"
            )
        shape = {
            "vocab_size",
            "max_length",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
        }
        typed = shape & self.given()
        if self.model is not None and typed:
            raise ValueError(f"--{min(typed).replace('_', '-')} has no effect with --model, whose network has its own")
        return self
