"""Files of weights that other tools wrote: what stands beside them or in their headers counts, or they are named."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdcli.encoders.textual_inversion import embedding_notes, read_embeddings
from sdcli.errors import BadWeights, SdcliError, UsageError
from sdcli.generation.prompt_notes import lora_notes
from sdcli.io.json_files import read_json_object
from sdcli.io.weight_files import check_header, shard_names
from sdcli.io.weight_kinds import kind_of
from sdcli.models.adapter_files import find_lora, lora_digest
from sdcli.models.controlnet import load_controlnet
from sdcli.models.families import family as family_configs
from sdcli.models.loaded_model import LoadedModel
from sdcli.models.loader import load_model
from sdcli.models.lora import ldm_name, read_lora, with_loras
from sdcli.models.networks import build_empty, network_class
from sdcli.models.registry import ModelSpec, load_registry
from sdcli.models.single_file import from_single_file
from sdcli.request.fields import EmbeddingRef, LoraRef
from tests.ldm import ldm_checkpoint
from tests.loras import random_pairs, save_peft

CASES = Path(__file__).parent.parent / "cases"
GENERATION, TRAINING = CASES / "generation", CASES / "training"


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model(load_registry().find("tiny"), device="cpu", dtype="float32")


def merged(model: LoadedModel, path: Path) -> LoadedModel:
    return with_loras(model, (LoraRef(path=str(path)),), folder=None)


def same_unet(one: LoadedModel, other: LoadedModel) -> bool:
    return all(torch.equal(weight, other.unet.get_parameter(name)) for name, weight in one.unet.named_parameters())


# LoRAs


def test_a_peft_file_is_as_strong_by_its_own_name_as_in_its_folder(tiny: LoadedModel, tmp_path: Path) -> None:
    """r 4 and lora_alpha 16: without its configuration it would be a quarter as strong."""
    folder = GENERATION / "peft_adapter"
    file = folder / "adapter_model.safetensors"
    whole, by_name = merged(tiny, folder), merged(tiny, file)
    assert same_unet(whole, by_name)
    assert not same_unet(whole, tiny)
    assert lora_digest(folder) == lora_digest(file), "the configuration is part of what the entry is pinned to"
    shutil.copy(file, tmp_path / "alone.safetensors")
    alone = merged(tiny, tmp_path / "alone.safetensors")
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    base, quarter, full = (one.unet.get_parameter(name) for one in (tiny, alone, whole))
    assert torch.allclose(4 * (quarter - base), full - base, atol=1e-6)
    (note,) = lora_notes(alone)
    assert "no adapter_config.json is beside it, so alpha is taken to be the rank" in note


def test_a_configuration_of_another_adapter_is_refused(tmp_path: Path, tiny: LoadedModel) -> None:
    shutil.copytree(GENERATION / "peft_adapter", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    for path in (tmp_path / "a", tmp_path / "a" / "adapter_model.safetensors"):
        with pytest.raises(BadWeights, match="has the rank 4, and its configuration says 8"):
            merged(tiny, path)


def test_pefts_patterns_count_by_the_ends_of_names_and_the_first_one_wins(tmp_path: Path, tiny: LoadedModel) -> None:
    pairs = random_pairs({"unet": tiny.unet}, only="attn1.to_q")
    names = sorted(pairs["unet"])
    patterns = {f"^{names[0]}": 6, names[1]: 9, "to_q": 12, "attn1.to_q": 99, "^to_q": 99}
    save_peft(tmp_path / "a", pairs, alpha=3, alpha_pattern=patterns)
    scales = [layer.scale for _, layer in sorted(read_lora(tmp_path / "a").layers.items())]
    assert scales == [2.0, 3.0, *[4.0] * (len(names) - 2)]
    assert len(names) > 2


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"use_dora": True}, "is DoRA"),
        ({"peft_type": "ADALORA"}, "is ADALORA"),
        ({"peft_type": "IA3"}, "is IA3"),
        ({"use_qalora": True}, "is QALoRA"),
        ({"lora_bias": True}, r"bias of its own \(lora_bias\)"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"layer_replication": [[0, 2]]}, "repeats layers"),
    ],
)
def test_what_peft_makes_of_a_lora_is_refused_by_name_beside_a_file_too(
    tmp_path: Path, tiny: LoadedModel, config: dict[str, Any], sentence: str
) -> None:
    folder = save_peft(tmp_path / "a", random_pairs({"unet": tiny.unet}, only="conv_in"), alpha=3, **config)
    for path in (folder, folder / "adapter_model.safetensors"):
        with pytest.raises(UsageError, match=f"{sentence}.*which sdcli cannot merge"):
            read_lora(path)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("base_model.model.conv_in.bias", r"trained biases \(bias, modules_to_save\)"),
        ("base_model.model.conv_in.lora_B.bias", "a bias of the LoRA"),
        ("base_model.model.conv_out.weight", "whole trained modules"),
        ("base_model.model.x.lora_embedding_A", "a LoRA of token embeddings"),
    ],
)
def test_what_peft_trains_beside_a_lora_is_refused_by_name(
    tmp_path: Path, tiny: LoadedModel, name: str, sentence: str
) -> None:
    folder = save_peft(tmp_path / "a", random_pairs({"unet": tiny.unet}, only="conv_in"), alpha=3)
    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), name: torch.ones(4)}, file)
    with pytest.raises(UsageError, match=f"holds {sentence}.*{re.escape(name)}"):
        read_lora(file)


def test_lycoris_names_are_merged(tiny: LoadedModel) -> None:
    found = merged(tiny, GENERATION / "lycoris_prefix.safetensors")
    assert not found.loras[0].unmatched
    assert found.loras[0].layers == len(read_lora(GENERATION / "lycoris_prefix.safetensors").layers)
    assert not same_unet(found, tiny)


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        ("lycoris_conv_in.hada_w1_a", "LoHa"),
        ("lora_unet_conv_in.lokr_w2", "LoKr"),
        ("lora_unet_conv_in.on_input", r"\(IA\)3"),
        ("base_model.model.conv_in.ia3_l", r"\(IA\)3"),
        ("lora_unet_conv_in.oft_blocks", "OFT"),
        ("base_model.model.conv_in.boft_R", "BOFT"),
        ("lora_unet_conv_in.a1.weight", "GLoRA"),
        ("lora_unet_conv_norm_out.w_norm", "LyCORIS with trained norms"),
        ("lora_unet_conv_in.diff", "a file of whole differences"),
        ("lora_unet_conv_in.dora_scale", "DoRA"),
        ("unet.conv_in.lora_magnitude_vector", "DoRA"),
        ("diffusion_model.x.reshape_weight", "changes the shape"),
    ],
)
def test_other_algorithms_are_refused_by_name(tmp_path: Path, name: str, algorithm: str) -> None:
    pair = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(1, 4),
        "lora_unet_conv_in.lora_up.weight": torch.ones(4, 1),
    }
    save_file({**pair, name: torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=f"{algorithm}.*which sdcli cannot merge"):
        read_lora(tmp_path / "x.safetensors")


def test_an_alpha_of_kohyas_header_alone_is_named(tmp_path: Path) -> None:
    """kohya's own loader takes the rank where no layer has an alpha, so that is what happens here."""
    pair = {f"lora_unet_conv_in.lora_{end}.weight": torch.ones(4, 4) for end in ("down", "up")}
    facts = {"ss_network_dim": "4", "ss_network_alpha": "1.0"}
    save_file(pair, tmp_path / "x.safetensors", metadata=facts)
    lora = read_lora(tmp_path / "x.safetensors")
    assert [layer.scale for layer in lora.layers.values()] == [1.0]
    assert lora.notes == ("ss_network_alpha 1.0 of its header is not taken over: no layer has an alpha",)
    save_file({**pair, "lora_unet_conv_in.alpha": torch.tensor(1.0)}, tmp_path / "y.safetensors", metadata=facts)
    lora = read_lora(tmp_path / "y.safetensors")
    assert ([layer.scale for layer in lora.layers.values()], lora.notes) == ([0.25], ())


def test_a_lora_for_another_model_is_named_by_its_header_or_its_layers(tmp_path: Path, tiny: LoadedModel) -> None:
    for number, (layer, metadata, said) in enumerate(
        (
            ("lora_unet_x", {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "xl-v1-base/lora"),
            ("lora_unet_x", {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl_base_v1-0"),
            ("transformer.single_transformer_blocks.0.attn.to_q", None, "as of Flux"),
        )
    ):
        tensors = {f"{layer}.lora_down.weight": torch.ones(1, 2), f"{layer}.lora_up.weight": torch.ones(2, 1)}
        save_file(tensors, tmp_path / f"{number}.safetensors", metadata=metadata)
        with pytest.raises(BadWeights, match=f"made for another model family .*{re.escape(said)}"):
            merged(tiny, tmp_path / f"{number}.safetensors")


def test_a_folder_that_diffusers_wrote_is_its_file(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    assert find_lora(str(tmp_path), None) == tmp_path / "pytorch_lora_weights.safetensors"


# Embeddings


def embedded(path: Path, **widths: int) -> Any:
    ref = EmbeddingRef(path=str(path), token="ink")
    return read_embeddings([ref], widths=widths or {"clip_l": 32}, most=75, model="tiny")


def test_onetrainers_embedding_is_used_and_what_is_left_of_it_is_named() -> None:
    path = GENERATION / "onetrainer_embedding.safetensors"
    stored = load_file(path)
    found = embedded(path)
    assert torch.equal(found.vectors[0], stored["emp_params"])
    (note,) = embedding_notes([EmbeddingRef(path=str(path))], encoders=["text_encoder"])
    assert "emp_params_out is not taken over" in note


def test_embeddings_of_other_layouts_are_read_or_named(tmp_path: Path) -> None:
    def saved(**tensors: Tensor) -> Path:
        save_file(tensors, tmp_path / "x.safetensors")
        return tmp_path / "x.safetensors"

    two = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    for name in ("emb_params", "emp_params", "clip_l", "<ink>", "*", "text_encoders_0"):
        assert torch.equal(embedded(saved(**{name: two})).vectors[0], two), name
    with pytest.raises(UsageError, match=r"output of the text encoder alone \(emp_params_out\)"):
        embedded(saved(emp_params=torch.zeros(2, 32), emp_params_out=two))
    sdxl = saved(clip_l=two, clip_g=torch.ones(2, 40))
    assert torch.equal(embedded(sdxl).vectors[0], two), "both models have CLIP ViT-L first"
    (note,) = embedding_notes([EmbeddingRef(path=str(sdxl))], encoders=["unet", "text_encoder"])
    assert "clip_g is not taken over: the model has no such text encoder" in note
    assert not embedding_notes([EmbeddingRef(path=str(sdxl))], encoders=["text_encoder", "text_encoder_2"])
    both = embedded(saved(text_encoders_0=two, text_encoders_1=torch.ones(2, 40)), clip_l=32, clip_g=40)
    assert [tuple(vectors.shape) for vectors in both.vectors] == [(2, 32), (2, 40)]
    with pytest.raises(BadWeights, match="it is a LoRA; generate with it by --lora"):
        embedded(GENERATION / "lycoris_prefix.safetensors")


# ControlNets


def original_name(name: str, *, attended: frozenset[int]) -> str:
    """The name of a ControlNet's weight in the original code, for a UNet of one layer a block."""
    stem, end = name.rsplit(".", 1)
    if stem.startswith("controlnet_down_blocks."):
        return f"zero_convs.{stem.split('.')[1]}.0.{end}"
    if stem == "controlnet_mid_block":
        return f"middle_block_out.0.{end}"
    if stem.startswith("controlnet_cond_embedding."):
        rest = stem.split(".", 1)[1]
        place = {"conv_in": 0, "conv_out": 14}.get(rest)
        return f"input_hint_block.{2 * (int(rest.split('.')[1]) + 1) if place is None else place}.{end}"
    norm = re.fullmatch(r"(.*resnets\.\d+)\.norm([12])", stem)
    if norm is not None:
        first = ldm_name(f"{norm[1]}.conv1", layers_per_block=1, attended=frozenset())
        return f"{first.replace('in_layers.2', 'in_layers.0' if norm[2] == '1' else 'out_layers.0')}.{end}"
    return f"{ldm_name(stem, layers_per_block=1, attended=attended)}.{end}"


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("spelling", ["original", "diffusers"])
def test_a_controlnet_of_differences_is_the_whole_one(
    tmp_path: Path, tiny: LoadedModel, spelling: str, marked: bool
) -> None:
    torch.manual_seed(0)
    weights = {name: tensor.clone() for name, tensor in ControlNetModel.from_unet(tiny.unet).state_dict().items()}
    for tensor in weights.values():
        tensor += 0.02 * torch.randn_like(tensor)
    base = tiny.unet.state_dict()
    less = {name: tensor - base[name] if name in base else tensor for name, tensor in weights.items()}

    def written(path: Path, tensors: Mapping[str, Tensor], **more: Tensor) -> Path:
        attended = frozenset({1})
        named = {f"control_model.{original_name(name, attended=attended)}": tensor for name, tensor in tensors.items()}
        chosen = named if spelling == "original" else tensors
        save_file({name: tensor.contiguous() for name, tensor in chosen.items()} | more, path)
        return path

    mark = {"difference": torch.zeros(0)} if marked else {}
    paths = written(tmp_path / "whole.safetensors", weights), written(tmp_path / "less.safetensors", less, **mark)
    whole, difference = (
        load_controlnet(load_registry().find_controlnet(str(path)), tiny).network.state_dict() for path in paths
    )
    assert all(torch.allclose(tensor, difference[name], atol=1e-5) for name, tensor in whole.items())


# What a file is


KINDS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "Control-LoRA": ({"lora_controlnet": (0,), "input_hint_block.0.weight": (1,)}, "a Control-LoRA"),
    "LLLite": ({"lllite_unet_input_blocks_1_1.down.0.weight": (1,)}, "a ControlNet-LLLite"),
    "T2I-Adapter": ({"adapter.body.0.resnets.0.block1.weight": (1,), "adapter.x": (2, 2)}, "a T2I-Adapter"),
    "T2I-Adapter, original": ({"body.0.in_conv.weight": (1,), "body.1.x": (2,)}, "a T2I-Adapter"),
    "motion module": ({"down_blocks.0.motion_modules.0.x": (1,)}, "a motion module of AnimateDiff"),
    "IP-Adapter": ({"image_proj.proj.weight": (1,), "ip_adapter.1.to_k_ip.weight": (1,)}, "an IP-Adapter"),
    "ControlNet": ({"control_model.input_hint_block.0.weight": (1,)}, "a ControlNet"),
    "LoRA": ({"lora_unet_conv_in.lora_down.weight": (1,), "x": (1,)}, "a LoRA"),
    "LyCORIS": ({"lycoris_conv_in.lokr_w1": (1,), "x": (1,)}, "a LoRA"),
    "embedding": ({"emb_params": (2, 768)}, "a textual inversion embedding"),
    "OneTrainer's embedding": ({"emp_params": (2, 768), "emp_params_out": (2, 768)}, "a textual inversion embedding"),
    "SDXL's embedding": ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "a textual inversion embedding"),
    "VAE": ({"decoder.up.0.block.0.conv1.weight": (1,), "encoder.conv_in.weight": (1,)}, "a VAE alone"),
    "VAE with its prefix": ({"first_stage_model.decoder.conv_in.weight": (1,)}, "a VAE alone"),
    "UNet": ({"input_blocks.0.0.weight": (1,), "out.2.bias": (1,)}, "a UNet alone"),
    "UNet of a checkpoint": ({"model.diffusion_model.input_blocks.0.0.weight": (1,)}, "the UNet of a model without"),
    "text encoder": ({"transformer.resblocks.0.ln_1.weight": (1,), "ln_final.bias": (1,)}, "a text encoder"),
    "part of diffusers": ({"down_blocks.0.resnets.0.conv1.weight": (1,), "conv_in.bias": (1,)}, "one part of a diff"),
    "Flux": ({"double_blocks.0.img_attn.qkv.weight": (1,), "x": (1,)}, "a transformer"),
    "ESRGAN": ({"model.0.weight": (1,), "model.1.sub.0.RDB1.conv1.0.weight": (1,)}, "an upscaler"),
    "latents": ({"latent_tensor": (1, 4, 8, 8)}, "a latent file"),
}


@pytest.mark.parametrize("case", KINDS)
def test_a_file_of_another_kind_is_named_by_what_it_is(tmp_path: Path, tiny: LoadedModel, case: str) -> None:
    shapes, what = KINDS[case]
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    kind = kind_of(check_header(path))
    assert kind is not None
    assert kind.what.startswith(what)
    with pytest.raises(SdcliError, match=re.escape(kind.what)):
        load_registry().find(str(path)).require_supported()
    with pytest.raises(SdcliError, match=re.escape(kind.what)):
        load_model(load_registry().find(str(path)), device="cpu")
    if "LoRA" not in what or "Control" in what:
        with pytest.raises(BadWeights, match="holds no LoRA: it is "):
            read_lora(path)
    if what != "a ControlNet":
        with pytest.raises(SdcliError, match="is not a ControlNet: it is "):
            load_controlnet(load_registry().find_controlnet(str(path)), tiny)
    if "embedding" not in what:
        with pytest.raises(SdcliError, match="is not a textual inversion embedding: it is "):
            embedded(path)


# Whole models in single files


def header_only(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> Path:
    """A file whose weights are a hole on the disk: zeros that take no space."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        size = 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    return path


@pytest.fixture(scope="module")
def sd15() -> dict[str, Tensor]:
    """The names and shapes of a single file of Stable Diffusion 1.5, without numbers."""
    configs = family_configs.shipped_configs("sd1")
    spec = load_registry().find("tiny")
    _, components = spec.family.components()
    states = []
    for part in ("unet", "vae", "text_encoder"):
        kind = network_class(configs[part], components[part], spec.family)
        states.append(build_empty(kind, configs[part], source=part).state_dict())
    return ldm_checkpoint(*states)


FIRST = "model.diffusion_model.input_blocks.0.0.weight"


def found_in(path: Path) -> ModelSpec:
    return load_registry().find(str(path))


def test_a_nine_channel_single_file_is_an_inpainting_model(tmp_path: Path, sd15: dict[str, Tensor]) -> None:
    nine = {**sd15, FIRST: torch.empty(320, 9, 3, 3, device="meta")}
    spec = found_in(header_only(tmp_path / "inpainting.safetensors", nine))
    spec.require_supported()
    assert spec.kind.inpaints
    assert not found_in(header_only(tmp_path / "plain.safetensors", sd15)).kind.inpaints


@pytest.mark.parametrize(("channels", "said"), [(8, "InstructPix2Pix"), (5, "depth2img"), (7, "upscaler"), (6, "6")])
def test_other_channels_are_named_at_once(tmp_path: Path, sd15: dict[str, Tensor], channels: int, said: str) -> None:
    other = {**sd15, FIRST: torch.empty(320, channels, 3, 3, device="meta")}
    path = header_only(tmp_path / "other.safetensors", other)
    with pytest.raises(UsageError, match=f"{re.escape(str(path))}: its UNet takes {channels} channels.*{said}?"):
        found_in(path).require_supported()
    with pytest.raises(UsageError, match=said):
        load_model(found_in(path), device="cpu")


def test_a_shape_that_does_not_fit_is_told_from_the_header(tmp_path: Path, sd15: dict[str, Tensor]) -> None:
    """The file's gigabytes are not read for it."""
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    path = header_only(tmp_path / "x.safetensors", {**sd15, name: torch.empty(1280, 1024, device="meta")})
    loader = from_single_file(path, torch.float32)
    with pytest.raises(BadWeights, match=r"has shape 1280x1024, its configuration asks for 1280x768"):
        loader.network("unet")


@pytest.mark.parametrize(
    ("metadata", "extra", "expected"),
    [
        ({"modelspec.prediction_type": "v"}, (), "v_prediction"),
        ({"modelspec.prediction_type": "V-Prediction"}, (), "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, (), "epsilon"),
        ({"ss_v_parameterization": "True"}, (), "v_prediction"),
        ({"ss_v_parameterization": "False"}, (), "epsilon"),
        ({"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, (), "v_prediction with zero SNR"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, (), "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v1"}, (), "epsilon"),
        ({"modelspec.prediction_type": "v"}, ("ztsnr",), "v_prediction with zero SNR"),
        ({"modelspec.prediction_type": "epsilon"}, ("v_pred",), "v_prediction"),
        ({}, ("v_pred", "ztsnr"), "v_prediction with zero SNR"),
    ],
)
def test_the_prediction_of_a_single_file_is_what_its_header_says(
    tmp_path: Path, metadata: dict[str, str], extra: tuple[str, ...], expected: str
) -> None:
    names = ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "first_stage_model.decoder.conv_out.bias")
    tensors = {name: torch.zeros(1) for name in (*names, "model.diffusion_model.out.2.bias", *extra)}
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata or None)
    config = from_single_file(tmp_path / "x.safetensors", torch.float32).scheduler_config
    zero = " with zero SNR" if config.get("rescale_betas_zero_snr") else ""
    assert config.get("prediction_type", "epsilon") + zero == expected


def test_the_case_of_v_prediction_in_the_metadata() -> None:
    loader = from_single_file(GENERATION / "vpred_in_metadata_sd15.safetensors", torch.float32)
    assert loader.scheduler_config["prediction_type"] == "v_prediction"


def test_a_prediction_that_sdcli_does_not_know_is_refused(tmp_path: Path, sd15: dict[str, Tensor]) -> None:
    path = header_only(tmp_path / "x.safetensors", sd15, {"modelspec.prediction_type": "flow"})
    with pytest.raises(UsageError, match=r"predicts 'flow' \(modelspec.prediction_type\)"):
        from_single_file(path, torch.float32)


# What lies in place of a file


STAND_INS: dict[str, tuple[bytes, str]] = {
    "lfs": ((TRAINING / "lfs_pointer.safetensors").read_bytes(), "is a Git LFS pointer.*git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s5--abc.safetensors\n", "is a git-annex pointer"),
    "page": (b"\n<!DOCTYPE html>\n<html><body>Log in</body></html>", r"is a web page \(HTML\)"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is an XML answer"),
    "answer": (b"Entry not found", r"is the answer of a server \(Entry not found\)"),
    "json answer": (b'{"error":"Invalid username or password."}', "is the answer of a server"),
}


@pytest.mark.parametrize("case", STAND_INS)
def test_what_lies_in_place_of_a_file_is_named_wherever_files_are_read(
    tmp_path: Path, tiny: LoadedModel, case: str
) -> None:
    data, sentence = STAND_INS[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(data)
    (tmp_path / "model.ckpt").write_bytes(data)
    for read in (
        lambda: load_model(found_in(path), device="cpu"),
        lambda: read_lora(path),
        lambda: embedded(path),
        lambda: load_controlnet(load_registry().find_controlnet(str(path)), tiny),
        lambda: found_in(tmp_path / "model.ckpt"),
    ):
        with pytest.raises(SdcliError, match=sentence):
            read()
    if case != "json answer":
        for read_json in (lambda: shard_names(index), lambda: read_json_object(index)):
            with pytest.raises(BadWeights, match=sentence):
                read_json()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"GGUF" + bytes(60), "is a GGUF file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(60), "is an HDF5 file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(60), "is a PNG image"),
        (b"", "it is empty"),
        (b"PK\x03\x04" + bytes(60), "is a pickle"),
    ],
)
def test_other_formats_under_the_suffix_are_named(tmp_path: Path, data: bytes, sentence: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(BadWeights, match=sentence):
        check_header(tmp_path / "x.safetensors")


def test_an_unfinished_download_is_told(tmp_path: Path) -> None:
    save_file({"x": torch.ones(100)}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    for name in ("a.safetensors.part", "b.safetensors"):
        (tmp_path / name).write_bytes(data[:-8])
    (tmp_path / "b.safetensors.aria2").touch()
    for name in ("a.safetensors.part", "b.safetensors"):
        with pytest.raises(BadWeights, match=r"is cut short.*its download is not finished"):
            check_header(tmp_path / name)
    (tmp_path / "c.safetensors").write_bytes(data + b"\0")
    with pytest.raises(BadWeights, match=r"is damaged: it has .* bytes, and its header describes"):
        check_header(tmp_path / "c.safetensors")
