"""Laws of weights that others write: one update is the same in every dialect, and no file is unexpected."""

from __future__ import annotations

import contextlib
import json
import math
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sdcli.encoders.textual_inversion import embedding_notes, read_embeddings
from sdcli.errors import SdcliError
from sdcli.io.weight_files import check_header
from sdcli.io.weight_kinds import kind_of
from sdcli.models.adapter_files import lora_digest
from sdcli.models.controlnet import load_controlnet
from sdcli.models.loaded_model import LoadedModel
from sdcli.models.loader import load_model
from sdcli.models.lora import ldm_name, lora_facts, with_loras
from sdcli.models.registry import load_registry
from sdcli.models.single_file import from_single_file
from sdcli.request.fields import EmbeddingRef, LoraRef
from tests.loras import DIALECTS, Update

QUIET: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@cache
def tiny() -> LoadedModel:
    return load_model(load_registry().find("tiny"), device="cpu", dtype="float32")


@cache
def layers() -> dict[str, list[str]]:
    """The layers that a LoRA may change, by part."""
    return {
        part: [name for name, one in tiny().parts[part].named_modules() if isinstance(one, nn.Linear | nn.Conv2d)]
        for part in ("unet", "text_encoder")
    }


@st.composite
def updates(draw: st.DrawFn) -> Update:
    rank, scale = draw(st.integers(1, 4)), draw(st.sampled_from([1.0, 0.25, 0.5, 2.0, 4.0, 16.0]))
    chosen = {
        part: draw(st.lists(st.sampled_from(layers()[part]), max_size=3, unique=True))
        for part in ("unet", "text_encoder")
    }
    if not any(chosen.values()):
        chosen["unet"] = layers()["unet"][:1]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    pairs: Any = {}
    for part, names in chosen.items():
        for name in names:
            weight: Any = tiny().parts[part].get_parameter(f"{name}.weight")
            down = torch.randn((rank, *weight.shape[1:]), generator=generator) / 8
            up = torch.randn((len(weight), rank, *(1,) * (weight.ndim - 2)), generator=generator) / 8
            pairs.setdefault(part, {})[name] = (down, up)
    attended = frozenset(n for n, block in enumerate(tiny().unet.up_blocks) if hasattr(block, "attentions"))
    original = {name: ldm_name(name, layers_per_block=1, attended=attended) for name in pairs.get("unet", {})}
    return Update(pairs, rank, scale, original)


def is_the_update(update: Update, write: Callable[[Path, Update], Path]) -> None:
    """The merged weights are W + scale * up @ down, and all others those of the model."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), update)
        merged = with_loras(tiny(), (LoraRef(path=str(path)),), folder=None)
    (applied,) = merged.loras
    assert (applied.unmatched, applied.notes) == ((), ())
    assert applied.layers == sum(map(len, update.pairs.values()))
    for part in ("unet", "text_encoder"):
        changed = update.pairs.get(part, {})
        for name, weight in merged.parts[part].named_parameters():
            before = tiny().parts[part].get_parameter(name)
            if name.removesuffix(".weight") not in changed:
                assert weight is before or torch.equal(weight, before), name
                continue
            down, up = changed[name.removesuffix(".weight")]
            expected = before + update.scale * (up.flatten(1) @ down.flatten(1)).reshape(before.shape)
            assert torch.allclose(weight, expected, rtol=1e-5, atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("write", DIALECTS, ids=lambda write: write.__name__)
@settings(max_examples=8, **QUIET)
@given(updates())
def test_one_update_in_every_dialect_merges_to_the_same_weights(
    write: Callable[[Path, Update], Path], update: Update
) -> None:
    is_the_update(update, write)


@pytest.mark.slow
@settings(max_examples=120, **QUIET)
@given(updates(), st.sampled_from(DIALECTS))
def test_hundreds_of_updates_in_any_dialect_merge_to_the_same_weights(
    update: Update, write: Callable[[Path, Update], Path]
) -> None:
    is_the_update(update, write)


# Any header


PIECES = (
    *("lora_unet_conv_in", "lora_te_text_model_encoder_layers_0_mlp_fc1", "lycoris_conv_in", "unet.conv_in"),
    *("base_model.model.conv_in", "text_encoder.encoder.layers.0.mlp.fc1", "transformer.x", "bundle_emb.x"),
    *("model.diffusion_model.input_blocks.0.0", "first_stage_model.decoder.conv_out", "control_model.zero_convs.0.0"),
    *("cond_stage_model.transformer.text_model.final_layer_norm", "cond_stage_model.model.ln_final"),
    *("conditioner.embedders.0.transformer", "conditioner.embedders.1.model", "joint_blocks.0", "double_blocks.0"),
    *(
        "image_proj.proj",
        "ip_adapter.1.to_k_ip",
        "adapter.body.0",
        "input_hint_block.0",
        "down_blocks.0",
        "decoder.up.0",
    ),
    *("controlnet_cond_embedding.conv_in", "controlnet_down_blocks.0", "time_embed.0", "conv_in", ""),
)
ENDS = (
    *(
        ".lora_down.weight",
        ".lora_up.weight",
        ".lora_mid.weight",
        ".alpha",
        ".lora_A.weight",
        ".lora_B.weight",
        ".lora_B",
    ),
    *(".lora_A.default.weight", ".lora.down.weight", ".lora_linear_layer.up.weight", "_lora.up.weight", ".weight"),
    *(".bias", ".hada_w1_a", ".lokr_w1", ".diff_b", ".w_norm", ".dora_scale", ".on_input", ".oft_blocks", ".a1.weight"),
)
WHOLE_NAMES = (
    *("emb_params", "emp_params", "emp_params_out", "clip_l", "clip_g", "clip_l_out", "text_encoders_0", "difference"),
    *("lora_controlnet", "v_pred", "ztsnr", "edm_vpred.sigma_max", "latent_tensor", "x", "é", "style_embedding"),
)
METADATA_KEYS = (
    *("modelspec.prediction_type", "modelspec.architecture", "ss_v_parameterization", "ss_network_alpha"),
    *("ss_network_dim", "ss_base_model_version", "lora_adapter_metadata", "format", "ss_zero_terminal_snr"),
)
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "F64": 8}
VALUES = ("v", "epsilon", "flow", "True", "1", "16", "nan", "{", "{}", "null", "[]", "", "é", "-v")
CONFIG_KEYS = ("r", "lora_alpha", "use_rslora", "peft_type", "alpha_pattern", "rank_pattern", "use_dora", "lora_bias")
CONFIG_VALUES = (None, -2, 0, 1, 2, 4, 9, "LORA", "x", {"conv_in": 2}, {"conv_in": None}, {"(": 1}, [1], True)
BROKEN: tuple[Any, ...] = (
    *({}, [], 3, {"dtype": 3, "shape": [-1]}, {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}),
    *({"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}, {"shape": [1], "data_offsets": [4, 0]}),
    {"shape": [True], "data_offsets": [0, 2**70]},
)
"""Entries of a header that no tool writes."""


def some_file(random: Random) -> bytes:
    """The bytes of a file: mostly a whole one with names of many tools, and sometimes one that is damaged."""
    header: dict[str, Any] = {}
    if random.random() < 0.5:
        header["__metadata__"] = {key: random.choice(VALUES) for key in random.sample(METADATA_KEYS, 2)}
        if random.random() < 0.5:
            facts = {
                f"{random.choice(['unet', 'text_encoder'])}.{key}": value for key, value in some_config(random).items()
            }
            header["__metadata__"]["lora_adapter_metadata"] = json.dumps(facts)
    end = 0
    for _ in range(random.randrange(9)):
        usual = random.choice(PIECES) + random.choice(ENDS)
        name = random.choice(WHOLE_NAMES) if random.random() < 0.2 else usual
        dtype = random.choice([*SIZES, "F32", "F32"])
        shape = [random.choice([0, 1, 2, 3, 4, 32]) for _ in range(random.choice([0, 1, 2, 2, 2, 4, 4]))]
        size = SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    odd = random.randrange(10)
    if odd == 0 and header:
        header[random.choice(sorted(header))] = random.choice(BROKEN)
    raw = json.dumps(header).encode()
    data = struct.pack("<Q", len(raw)) + raw + random.choice([b"\x00", b"\x01", b"\x3f", b"\xff"]) * min(end, 2**16)
    if odd == 1:
        cut = random.randrange(len(data))
        data = data[:cut] + random.randbytes(random.randrange(9)) + data[cut + random.randrange(9) :]
    return random.randbytes(random.randrange(80)) if odd == 2 else data


def some_config(random: Random) -> dict[str, Any]:
    return {key: random.choice(CONFIG_VALUES) for key in random.sample(CONFIG_KEYS, random.randrange(5))}


def some_adapter_config(random: Random) -> str | None:
    """What may stand beside a file."""
    pointer = "version https://git-lfs.github.com/spec/v1\n"
    return random.choice([None, None, pointer, json.dumps(some_config(random)), json.dumps(some_config(random))])


def no_file_is_unexpected(folder: Path, data: bytes, config: str | None) -> None:
    """Every reader of weights either takes the file or raises an error of ours."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes(data)
    (folder / "adapter_config.json").unlink(missing_ok=True)
    if config is not None:
        (folder / "adapter_config.json").write_text(config)
    embedding = EmbeddingRef(path=str(path), token="ink")
    readers: tuple[Callable[[], Any], ...] = (
        lambda: kind_of(check_header(path)),
        lambda: lora_facts(path),
        lambda: lora_digest(path),
        lambda: with_loras(tiny(), (LoraRef(path=str(path)),), folder=None),
        lambda: read_embeddings([embedding], widths={"clip_l": 32}, most=75, model="tiny"),
        lambda: embedding_notes([embedding], encoders=["text_encoder"]),
        lambda: load_registry_spec(path).require_supported(),
        lambda: from_single_file(path, torch.float32),
        lambda: load_controlnet(controlnet_spec(path), tiny()),
    )
    for read in readers:
        with contextlib.suppress(SdcliError):
            read()


@cache
def registry() -> Any:
    return load_registry()


def load_registry_spec(path: Path) -> Any:
    return registry().find(str(path))


def controlnet_spec(path: Path) -> Any:
    return registry().find_controlnet(str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=100, **QUIET)
@given(random=st.randoms())
def test_no_header_is_unexpected(folder: Path, random: Random) -> None:
    no_file_is_unexpected(folder, some_file(random), some_adapter_config(random))


@pytest.mark.slow
def test_thousands_of_headers_are_not_unexpected(folder: Path) -> None:
    for seed in range(3000):
        random = Random(seed)
        try:
            no_file_is_unexpected(folder, some_file(random), some_adapter_config(random))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
