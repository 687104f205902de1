"""The CLIP text encoder: token ids in, hidden states out.

The same networks as transformers' `CLIPTextModel` and `CLIPTextModelWithProjection`, bit for bit (tests/test_clip.py),
written out because importing those classes takes 1.7 s on a 2-core AMD EPYC, which is longer than generating a small
image. Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision": a causal,
pre-norm transformer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def quick_gelu(x: Tensor) -> Tensor:
    """GELU as CLIP has it (Hendrycks & Gimpel 2016, section 2)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


STORED_PREFIX = "text_model."
"""What the names of a text encoder's weights begin with in files; transformers before 5.6 loads no others."""
_PREFIXED = ("embeddings.", "encoder.layers.", "final_layer_norm.")


def stored_name(name: str) -> str:
    """The name of a weight in the files that other tools read, of any age; `text_projection` has no prefix there."""
    return f"{STORED_PREFIX}{name}" if name.startswith(_PREFIXED) else name


@dataclass(frozen=True)
class ClipTextConfig:
    """The fields of a text_encoder/config.json that matter here; the defaults are CLIP ViT-L/14's."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 49407
    """Of the last three only the end matters here, where a text is pooled; other tools want them in a config.json."""

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ClipTextConfig:
        """Take what is known from a config.json, ignore the rest."""
        return cls(**{name: config[name] for name in cls.__dataclass_fields__ if name in config})


class ClipTextEncoder(nn.Module):
    """Parameter names are those of transformers >= 5.6; files have them with a prefix (`stored_name`)."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, token_ids: Tensor, *, clip_skip: int = 1, vectors: Tensor | None = None) -> Tensor:
        """Token ids [B, L] -> hidden states [B, L, hidden_size], normalised; L is at most max_position_embeddings.

        They are those of the last layer, or with `clip_skip` of the n-th from the end (1..num_hidden_layers).
        Negative ids stand for rows of `vectors` [M, hidden_size]: -1 for row 0, -2 for row 1, ...
        """
        hidden = self.encoder(self.embeddings(token_ids, vectors), len(self.encoder.layers) - (clip_skip - 1))
        return self.final_layer_norm(hidden)

    def hidden_states(self, token_ids: Tensor, *, vectors: Tensor | None = None) -> list[Tensor]:
        """Token ids [B, L] -> what goes into the first layer and what comes out of each; [B, L, hidden_size] all.

        They are not normalised; the one before the last is the penultimate layer's. Negative ids as in `forward`.
        """
        states = [self.embeddings(token_ids, vectors)]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return states


class ProjectedClipTextEncoder(ClipTextEncoder):
    """The encoder with CLIP's projection, which makes one embedding of a whole text."""

    OLD_END = 2
    """Configurations before transformers 4.31 give this as `eos_token_id`; the end token is the highest id then."""

    def __init__(self, config: ClipTextConfig, *, projection_dim: int) -> None:
        super().__init__(config)
        self.text_projection = nn.Linear(config.hidden_size, projection_dim, bias=False)

    def pooled(self, last: Tensor, token_ids: Tensor) -> Tensor:
        """The last of `hidden_states` [B, L, hidden_size] and its token ids [B, L] -> embeddings [B, projection_dim].

        That is the normalised state of the first end token, projected.
        """
        end = self.config.eos_token_id
        ends = token_ids if end == self.OLD_END else (token_ids == end).int()
        rows = torch.arange(len(token_ids), device=token_ids.device)
        return self.text_projection(self.final_layer_norm(last)[rows, ends.argmax(dim=-1)])


class _Embeddings(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        # from_pretrained, because nn.Embedding's own initialisation imports torch._dynamo (0.8 s) on the meta device
        self.token_embedding = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size))
        self.position_embedding = nn.Embedding.from_pretrained(
            torch.empty(config.max_position_embeddings, config.hidden_size)
        )

    def forward(self, token_ids: Tensor, vectors: Tensor | None) -> Tensor:
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        embedded = self.token_embedding(token_ids.clamp(min=0))
        if vectors is not None:
            own = vectors[(-1 - token_ids).clamp(min=0)]
            embedded = torch.where((token_ids < 0)[..., None], own, embedded)
        return embedded + self.position_embedding(positions)


class _Encoder(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Tensor, count: int) -> Tensor:
        for layer in self.layers[:count]:
            hidden = layer(hidden)
        return hidden


class _Layer(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _Mlp(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class _Attention(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        queries, keys, values = (
            project(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden)))
