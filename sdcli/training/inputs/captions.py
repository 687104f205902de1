"""The text of a training sample from an image's captions: choice, dropout, shuffling, prefix and template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdcli.io import rng


@dataclass(frozen=True)
class CaptionRules:
    """How captions are changed before they are encoded."""

    dropout: float = 0.1
    """Share of samples with the empty caption, so that the model also learns unconditional generation."""
    shuffle: bool = False
    keep: int = 0
    """Number of comma-separated parts at the start that are not shuffled."""
    prefix: str = ""
    template: str = "{prompt}"
    """Template around every caption but the empty one, as in `generate`."""

    def text(self, captions: Sequence[str], *, seed: int, counter: int) -> str:
        """The text of one sample; a pure function of its arguments."""
        draw = rng.scalars(seed, counter, "caption")
        dropped = draw.random() < self.dropout
        chosen = draw.choice(captions) if captions else ""
        if dropped or not captions:
            return ""
        if self.shuffle:
            parts = [part.strip() for part in chosen.split(",")]
            rest = parts[self.keep :]
            draw.shuffle(rest)
            chosen = ", ".join(parts[: self.keep] + rest)
        return self.wrapped(chosen)

    def wrapped(self, caption: str) -> str:
        """A caption with the prefix, in the template."""
        return self.template.replace("{prompt}", self.prefix + caption)

    def all_texts(self, captions: Sequence[str]) -> list[str] | None:
        """All texts that `text` can return for these captions; None with shuffling, which has too many."""
        if self.shuffle:
            return None
        return ["", *(self.wrapped(caption) for caption in captions)]
