"""What a file of weights holds (a model, a LoRA, a VAE, ...), recognised by the names and shapes in its header."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Header = Mapping[str, Any]


@dataclass(frozen=True)
class WeightKind:
    """A kind of file that people mistake for another one."""

    what: str
    """With its article, as a sentence names it."""
    use: str = ""
    """What to do with it; `{path}` is the file's path, quoted for a shell."""

    def sentence(self, path: Path | str, *, wanted: str) -> str:
        """`a.safetensors is a LoRA, not a ControlNet; generate with it by --lora a.safetensors`."""
        return f"{path} is {self.described(path, wanted=wanted)}"

    def described(self, path: Path | str, *, wanted: str = "") -> str:
        """The end of such a sentence."""
        advice = self.use.format(path=shlex.quote(str(path)))
        return f"{self.what}{f', not {wanted}' if wanted else ''}{f'; {advice}' if advice else ''}"


LORA = WeightKind("a LoRA", "generate with it by --lora {path}")
CONTROLNET = WeightKind("a ControlNet", "generate with it by --control {path}=IMAGE")
EMBEDDING = WeightKind("a textual inversion embedding", "generate with it by --embedding {path}")
IP_ADAPTER = WeightKind("an IP-Adapter", "generate with it by --ip-adapter {path}=IMAGE")
WHOLE_MODEL = WeightKind("a whole model", "generate with it by --model {path}")
PART = WeightKind("one part of a diffusers model", "give the folder that holds model_index.json")
LYCORIS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "hada": "LoHa",
    "lokr": "LoKr",
    "boft": "BOFT",
    "oft": "OFT",
    "on_input": "(IA)3",
    "ia3_l": "(IA)3",
    "vera_lambda": "VeRA",
    "a1": "GLoRA",
    "b1": "GLoRA",
    "w_norm": "LyCORIS with trained norms (w_norm)",
    "b_norm": "LyCORIS with trained norms (b_norm)",
    "reshape_weight": "a LoRA that changes the shape of weights (reshape_weight)",
    "set_weight": "a file of replaced weights (set_weight)",
    "diff": "a file of whole differences",
}
"""What the names of the weights of other algorithms than LoRA end with, after a dot -> the algorithm's name."""
_LYCORIS = re.compile(rf".*\.({'|'.join(LYCORIS)})(?:_[A-Za-z0-9_]+)?(?:\.default)?(?:\.weight)?")
_LORA = re.compile(r".*[._]lora(?:_linear_layer)?[._](?:down|up|mid|A|B)(?:\.default)?(?:\.weight)?")
_MAX_EMBEDDING_ROWS, _MIN_WIDTH = 1000, 16


def other_algorithm(name: str) -> str | None:
    """The algorithm that a tensor of this name belongs to, if it is an adapter that is no LoRA."""
    match = _LYCORIS.fullmatch(name)
    return LYCORIS[match[1]] if match is not None else None


def kind_of(header: Header) -> WeightKind | None:
    """What a file with this header is, if it is one of the kinds that people mistake for others."""
    names = [name for name in header if name != "__metadata__"]
    return next((kind for kind, holds in _KINDS if holds(names, header)), None)


Test = Callable[[list[str], Header], bool]


def _some(*starts: str) -> Test:
    return lambda names, _: any(name.startswith(starts) for name in names)


def _within(*pieces: str) -> Test:
    return lambda names, _: any(piece in name for name in names for piece in pieces)


def _both(*starts: str) -> Test:
    return lambda names, _: all(any(name.startswith(start) for name in names) for start in starts)


def _lora(names: list[str], header: Header) -> bool:
    return any(_LORA.fullmatch(name) or _LYCORIS.fullmatch(name) for name in names)


def _embedding(names: list[str], header: Header) -> bool:
    return bool({"emb_params", "emp_params", "emp_params_out", "clip_l", "clip_g"} & set(names))


def _one_table(names: list[str], header: Header) -> bool:
    """One tensor of few rows by any name, as diffusers writes the vectors of a word."""
    shape = header[names[0]].get("shape", []) if len(names) == 1 else []
    return 1 <= len(shape) <= 2 and shape[-1] >= _MIN_WIDTH and math.prod(shape[:-1]) <= _MAX_EMBEDDING_ROWS


_KINDS: tuple[tuple[WeightKind, Test], ...] = (
    (WeightKind("a Control-LoRA, which sdcli cannot use"), _some("lora_controlnet")),
    (WeightKind("a ControlNet-LLLite, which sdcli cannot use"), _within("lllite")),
    (WeightKind("a motion module of AnimateDiff, which sdcli cannot use"), _within("motion_modules.")),
    (IP_ADAPTER, _both("image_proj.", "ip_adapter.")),
    (WeightKind("an adapter for faces (FaceID, InstantID), which sdcli cannot use"), _both("image_proj.")),
    (WHOLE_MODEL, _both("model.diffusion_model.", "first_stage_model.")),
    (WeightKind("the UNet of a model without its VAE or text encoder"), _some("model.diffusion_model.")),
    (CONTROLNET, _some("control_model.", "controlnet_cond_embedding.", "input_hint_block.", "zero_convs.")),
    (WeightKind("a T2I-Adapter, which sdcli cannot use"), _some("adapter.body.", "body.0.block1.", "body.0.in_conv.")),
    (WeightKind("a style adapter (T2I), which sdcli cannot use"), _some("style_embedding")),
    (WeightKind("an upscaler (ESRGAN), which sdcli cannot use"), _some("model.1.sub.", "body.0.rdb1.", "RRDB_trunk.")),
    (LORA, _lora),
    (EMBEDDING, _embedding),
    (
        WeightKind("a transformer (as of Flux or Stable Diffusion 3), which sdcli reads in a diffusers folder alone"),
        _some("double_blocks.", "joint_blocks.", "transformer_blocks.", "single_transformer_blocks."),
    ),
    (WeightKind("a latent file", "sdcli decode {path} makes an image of it"), _some("latent_tensor")),
    (
        WeightKind("a VAE alone"),
        _some("first_stage_model.", "decoder.up.", "decoder.mid.", "encoder.down.", "decoder.conv_in."),
    ),
    (
        WeightKind("a text encoder of Stable Diffusion alone"),
        _some("cond_stage_model.", "conditioner.", "transformer.resblocks.", "encoder.block.", "text_projection"),
    ),
    (WeightKind("an image encoder (CLIP vision)"), _some("vision_model.", "visual.")),
    (WeightKind("a UNet alone, by the original names"), _some("input_blocks.", "diffusion_model.", "output_blocks.")),
    (PART, _some("down_blocks.", "up_blocks.", "decoder.up_blocks.", "encoder.down_blocks.", "text_model.")),
    (PART, _some("encoder.layers.", "embeddings.token_embedding.", "time_embedding.")),
    (EMBEDDING, _one_table),
)
"""In this order, for some files have names of two kinds."""
