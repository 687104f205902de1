"""An image's captions -> the text of one sample: alternatives, dropout, shuffling, prefix, template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdcli.io import rng


@dataclass(frozen=True)
class CaptionRules:
    """What happens to captions on their way to the text encoder."""

    dropout: float = 0.1
    """Share of samples that get the empty caption, so that the model also learns to generate without one."""
    shuffle: bool = False
    keep: int = 0
    """Comma-separated parts at the front that stay there when the others are shuffled."""
    prefix: str = ""
    template: str = "{prompt}"
    """Wraps every caption but the empty one, as `generate` wraps prompts."""

    def text(self, captions: Sequence[str], *, seed: int, counter: int) -> str:
        """The caption of one sample; a pure function of its arguments."""
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
        """A caption with prefix and template."""
        return self.template.replace("{prompt}", self.prefix + caption)

    def all_texts(self, captions: Sequence[str]) -> list[str] | None:
        """Every text that `text` can give for these captions; None where shuffling makes them countless."""
        if self.shuffle:
            return None
        return ["", *(self.wrapped(caption) for caption in captions)]
