"""Records of other tools as bytes: each is taken over as it was written, or named, or not a record at all."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdcli.cli.options.from_image import recorded_fields
from sdcli.cli.ui.console import Console
from sdcli.errors import BadImage
from sdcli.images.image_files import open_image
from sdcli.metadata.invokeai_prompt import converted as from_compel
from sdcli.metadata.novelai import converted as from_novelai
from sdcli.metadata.read import ImageInfo, read_image, read_tool_record
from sdcli.metadata.text_bytes import plain_text, user_comment
from sdcli.request.lora_tags import read_tags
from sdcli.request.prompt_syntax import subprompts
from tests.metadata import foreign_writers as write

CASES = Path(__file__).parent.parent / "cases" / "generation"
PARAMETERS = "Steps: 22, Sampler: Euler a, CFG scale: 6.5, Seed: 4242, Size: 512x640"
TEXT = f"a lighthouse at dusk\nNegative prompt: blurry\n{PARAMETERS}"
READ = {
    "prompt": "a lighthouse at dusk", "negative_prompt": "blurry", "seed": 4242, "steps": 22, "guidance_scale": 6.5,
    "width": 512, "height": 640, "scheduler": "euler-a",
}  # fmt: skip


def fields(info: ImageInfo) -> dict[str, Any]:
    assert info.request is not None
    return {name: value for name, value in info.request.typed().items() if name not in ("schema", "prompt_template")}


def read(tmp_path: Path, data: bytes) -> ImageInfo:
    path = tmp_path / "image"
    path.write_bytes(data)
    return read_image(path)


def spans(prompt: str) -> list[tuple[str, float]]:
    """What the text encoder gets of a prompt that does not change from step to step."""
    (part,) = subprompts(prompt, steps=20)
    ((_, text),) = part.texts
    found = [(span.text, round(span.weight, 4)) for section in text.sections for span in section]
    return [(piece.strip(), weight) for piece, weight in found if piece.strip()]


# the files of the manifest


def test_utf8_in_a_text_chunk_is_read() -> None:
    info = read_image(CASES / "utf8_in_text_chunk.png")
    assert fields(info) == READ | {"prompt": "灯台、夕暮れ、油絵", "negative_prompt": "ぼやけた"}
    assert info.unmapped == {"Model": "m.safetensors", "RNG": "cuda", "Version": "stable-diffusion.cpp"}


def test_swarmuis_little_endian_json_is_read() -> None:
    info = read_image(CASES / "swarm_utf16le.jpg")
    assert info.source == "swarmui"
    assert fields(info) == READ | {"scheduler": "euler"}
    assert info.unmapped == {"model": "someModel", "swarm_version": "0.9.6.0"}


def test_fooocus_comment_in_the_first_directory_is_read() -> None:
    info = read_image(CASES / "fooocus_comment_in_ifd0.jpg")
    assert (info.source, fields(info)) == ("a1111", READ)
    assert info.unmapped == {"Sharpness": "2.0", "Version": "Fooocus v2.5.5"}


def test_lines_behind_the_parameters_are_named() -> None:
    info = read_image(CASES / "dynprompts_template_lines.png")
    assert fields(info) == READ | {"prompt": "a lighthouse at dusk, oil painting", "negative_prompt": "blurry, lowres"}
    assert info.unmapped["Template"] == "a {lighthouse|castle} at __time__, oil painting"
    assert info.unmapped["Negative Template"] == "blurry, lowres"


def test_invokeais_weights_are_kept() -> None:
    prompt = fields(read_image(CASES / "invoke_prompt_syntax.png"))["prompt"]
    assert prompt == "a (lighthouse:1.21) at dusk, (oil painting:1.3), (people:0.9)"


def test_a_tag_that_is_not_understood_is_left_out_and_named() -> None:
    info = read_image(CASES / "lora_block_weight_tag.png")
    assert fields(info) == READ | {"prompt": "a lighthouse at dusk, oil painting", "negative_prompt": "blurry, lowres"}
    assert info.unmapped["lora"].startswith("<lora:ink:0.8:lbw=OUTALL>: ")


def test_generate_goes_on_without_what_it_cannot_take_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    path = CASES / "lora_block_weight_tag.png"
    kept = {"without": None, "typed": {}, "replaced": set(), "lora_dir": None}
    found = recorded_fields(path, console=Console(), **kept)  # type: ignore[arg-type]
    assert (found["prompt"], found["loras"]) == ("a lighthouse at dusk, oil painting", [])
    told = " ".join(capsys.readouterr().err.split())
    assert f"not taken from {path}: lora = <lora:ink:0.8:lbw=OUTALL>: " in told


def test_a_negative_prompt_that_has_no_effect_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "a cat\nNegative prompt: ugly\nSteps: 4, Sampler: LCM, CFG scale: 1, Seed: 5, Size: 64x64"
    (tmp_path / "a.png").write_bytes(write.png(write.text_chunk("parameters", text.encode(), "tEXt")))
    how: dict[str, Any] = {"without": None, "replaced": set(), "lora_dir": None, "console": Console()}
    assert "negative_prompt" not in recorded_fields(tmp_path / "a.png", typed={}, **how)
    assert "its negative prompt, which has no effect" in " ".join(capsys.readouterr().err.split())
    assert recorded_fields(tmp_path / "a.png", typed={"guidance_scale": 7}, **how)["negative_prompt"] == "ugly"


def test_the_xmp_of_draw_things_is_read() -> None:
    info = read_image(CASES / "drawthings_xmp.png")
    assert info.source == "draw-things"
    assert fields(info) == {name: value for name, value in READ.items() if name != "scheduler"}


def test_an_image_with_a_large_colour_profile_is_opened() -> None:
    path = CASES / "large_icc_profile.png"
    assert open_image(path).size == (64, 64)
    assert read_image(path).width == 64


# bytes


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "iTXt packed"])
def test_text_chunks_of_every_kind_are_read(tmp_path: Path, kind: str, late: bool) -> None:
    text = TEXT.replace("dusk", "Dämmerung 夕暮れ")
    info = read(tmp_path, write.png(write.text_chunk("parameters", text.encode(), kind), late=late))
    assert info.parameters == text
    assert fields(info) == READ | {"prompt": "a lighthouse at Dämmerung 夕暮れ"}


COMMENTS = {
    "UNICODE, big-endian": b"UNICODE\0" + TEXT.encode("utf-16-be"),
    "UNICODE, little-endian": b"UNICODE\0" + TEXT.encode("utf-16-le"),
    "UNICODE with a mark": b"UNICODE\0\xff\xfe" + TEXT.encode("utf-16-le"),
    "UNICODE with the other mark": b"UNICODE\0\xfe\xff" + TEXT.encode("utf-16-be"),
    "UNICODE, UTF-8": b"UNICODE\0" + TEXT.encode(),
    "UNICODE, NULs behind": b"UNICODE\0" + TEXT.encode("utf-16-be") + bytes(7),
    "ASCII": b"ASCII\0\0\0" + TEXT.encode() + b"\0",
    "JIS": b"JIS\0\0\0\0\0" + TEXT.encode("iso2022_jp"),
    "no name": bytes(8) + TEXT.encode(),
    "bare": TEXT.encode(),
    "bare UTF-16": TEXT.encode("utf-16-le"),
}


@pytest.mark.parametrize("comment", COMMENTS.values(), ids=COMMENTS.keys())
@pytest.mark.parametrize("kind", [1, 2, 7], ids=["BYTE", "ASCII", "UNDEFINED"])
def test_user_comments_are_read_in_all_their_forms(tmp_path: Path, comment: bytes, kind: int) -> None:
    for order in ("<", ">"):
        for format, inner in [("jpeg", True), ("jpeg", False), ("webp", True), ("webp", False), ("png", True)]:
            info = read(tmp_path, write.commented(comment, format=format, inner=inner, kind=kind, order=order))  # type: ignore[arg-type]
            assert (info.source, fields(info)) == ("a1111", READ), (order, format, inner)
            assert info.parameters == TEXT


def test_other_places_of_a_text_are_read(tmp_path: Path) -> None:
    description, xp_comment = 0x010E, 0x9C9C
    packet = write.xmp_packet(f"<exif:UserComment>{TEXT}</exif:UserComment>")
    for data in [
        write.jpeg((0xFE, TEXT.encode())),
        write.with_exif("jpeg", write.exif({description: (2, TEXT.encode() + b"\0")}, {}, "<")),
        write.with_exif("webp", write.exif({xp_comment: (1, TEXT.encode("utf-16-le") + bytes(2))}, {}, "<")),
        write.png(write.text_chunk("Parameters", TEXT.encode())),
        write.png(write.text_chunk("XML:com.adobe.xmp", packet, "iTXt")),
    ]:
        info = read(tmp_path, data)
        assert (info.source, fields(info)) == ("a1111", READ)


def test_comfyuis_fields_are_read_wherever_they_stand(tmp_path: Path) -> None:
    graph = json.dumps({"1": {"class_type": "KSampler", "inputs": {"seed": 4, "steps": 9}}})
    make, model, description = 0x010F, 0x0110, 0x010E
    for tag in (make, model, description):
        data = write.with_exif("webp", write.exif({tag: (2, b"Prompt:" + graph.encode() + b"\0")}, {}, "<"))
        info = read(tmp_path, data)
        assert (info.source, fields(info)["seed"], fields(info)["steps"]) == ("comfyui", 4, 9)


def test_the_exif_that_imagemagick_writes_into_a_png_is_read(tmp_path: Path) -> None:
    data = b"Exif\0\0" + write.exif({}, {write.COMMENT: (7, b"UNICODE\0" + TEXT.encode("utf-16-be"))})
    for key, name in [("exif", b"exif"), ("APP1", b"generic profile")]:
        profile = b"\n%s\n%8d\n%s\n" % (name, len(data), data.hex().encode())
        info = read(tmp_path, write.png(write.text_chunk(f"Raw profile type {key}", profile, "zTXt")))
        assert (info.source, fields(info)) == ("a1111", READ)


def test_both_graphs_of_comfyui_in_one_comment_are_read(tmp_path: Path) -> None:
    graph = {"1": {"class_type": "KSampler", "inputs": {"seed": 4, "steps": 9}}}
    text = json.dumps({"prompt": graph, "workflow": {"nodes": []}})
    info = read(tmp_path, write.commented(b"UNICODE\0" + text.encode("utf-16-be")))
    assert (info.source, fields(info)["seed"]) == ("comfyui", 4)


def test_what_is_no_record_is_shown_and_is_no_prompt(tmp_path: Path) -> None:
    info = read(tmp_path, write.commented(b"ASCII\0\0\0Screenshot"))
    assert (info.source, info.request, info.unmapped) == (None, None, {"UserComment": "Screenshot"})
    for comment in (b"UNICODE\0" + bytes(range(1, 255, 2)) * 3, b"\x93\x01\xfe\xff" * 20):
        info = read(tmp_path, write.commented(comment))
        assert info.request is None
        assert "in no encoding" in info.unmapped["UserComment"]


@pytest.mark.parametrize("encoding", ["gb18030", "shift_jis", "cp1251", "koi8_r", "euc_kr"])
def test_bytes_of_another_alphabet_are_no_prompt(tmp_path: Path, encoding: str) -> None:
    word = {"gb18030": "灯台", "shift_jis": "灯台", "euc_kr": "등대"}.get(encoding, "маяк")
    data = TEXT.replace("lighthouse", word).encode(encoding)
    info = read(tmp_path, write.png(write.text_chunk("parameters", data)))
    assert (info.source, info.request, info.parameters) == (None, None, None)
    assert info.unmapped["parameters"] == f"{len(data)} bytes in no encoding that is known for it"


@pytest.mark.parametrize("text", ["naïve façade", "Ångström, Größe, Çédille", "¡Olé! 5 °C «oui»", "", "été à Orléans"])
def test_western_texts_stay_latin_1(text: str) -> None:
    assert plain_text(text.encode("latin-1")) == text


def test_swapped_utf16_without_ascii_follows_the_order_of_the_file() -> None:
    assert user_comment(b"UNICODE\0" + "灯台の夕暮れ".encode("utf-16-le"), "<") == "灯台の夕暮れ"
    assert user_comment(b"UNICODE\0" + "灯台の夕暮れ".encode("utf-16-be"), ">") == "灯台の夕暮れ"


def test_two_chunks_of_one_name_are_both_told(tmp_path: Path) -> None:
    chunks = [write.text_chunk("parameters", text.encode()) for text in (TEXT, TEXT.replace("4242", "7"))]
    info = read(tmp_path, write.png(*chunks))
    assert fields(info)["seed"] == 7
    assert info.unmapped["other texts"] == ["parameters (1)"]


# limits


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "iTXt packed"])
def test_a_text_of_three_megabytes_is_read(tmp_path: Path, kind: str) -> None:
    text = TEXT.replace("dusk", "dusk, " * 500_000)
    path = tmp_path / "long.png"
    path.write_bytes(write.png(write.text_chunk("parameters", text.encode(), kind)))
    assert read_image(path).parameters == text
    assert open_image(path).size == (16, 16)


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "iTXt packed"])
def test_a_text_over_the_limit_is_refused_in_a_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(write.png(write.text_chunk("parameters", b"x" * 17 * 2**20, kind)))
    for attempt in (read_image, open_image):
        with pytest.raises(BadImage, match=r"bomb.png: cannot be read: its text 'parameters' is larger than 16 MiB$"):
            attempt(path)


def test_a_colour_profile_over_the_limit_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(write.png(write.png_chunk(b"iCCP", b"big\0\0" + zlib.compress(bytes(17 * 2**20)))))
    with pytest.raises(BadImage, match=r"its colour profile is larger than 16 MiB$"):
        open_image(path)


def test_many_texts_are_refused_together(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(write.png(*[write.text_chunk(f"t{n}", bytes(9 * 2**20), "zTXt") for n in range(8)]))
    with pytest.raises(BadImage, match=r"its texts are larger than 64 MiB in all$"):
        read_image(path)


def test_only_so_many_chunks_are_read_and_the_rest_is_told(tmp_path: Path) -> None:
    info = read(tmp_path, write.png(*[write.text_chunk(f"t{n}", b"x") for n in range(1002)]))
    assert info.unmapped["more texts"] == "2 more text chunks, not read"


def test_no_sentence_about_a_damaged_image_names_the_library(tmp_path: Path) -> None:
    dice = np.random.default_rng(5)
    file = io.BytesIO()
    Image.fromarray(dice.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file, format="PNG")
    good = file.getvalue()
    samples = [good[: len(good) // 2], good[:40] + b"\0\0" + good[42:], write.blank("JPEG")[:300], write.webp()[:80]]
    samples += [write.png(write.png_chunk(b"iCCP", b"x\0\0" + b"no stream")), write.png(write.png_chunk(b"tRNS", b""))]
    for _ in range(60):
        hurt = bytearray(good)
        hurt[int(dice.integers(8, 200))] = int(dice.integers(0, 256))
        samples.append(bytes(hurt))
    sentences: set[str] = set()
    for data in samples:
        path = tmp_path / "hurt"
        path.write_bytes(data)
        try:
            open_image(path)
        except BadImage as error:
            sentences.add(str(error).replace(str(path), ""))
    assert len(sentences) > 1
    for sentence in sentences:
        assert not re.search(r"[A-Z]+_[A-Z]+|[a-z][A-Z]|Pillow|PIL|Error|<_io|0x", sentence.replace("WebP", ""))


# A1111 and those that write its text

PAIRS = {"Steps": 22, "Sampler": "Euler a", "CFG scale": 6.5, "Seed": 4242, "Size": "512x640"}


@pytest.mark.parametrize(
    ("more", "unmapped"),
    [
        ('Hires prompt: "a,\nSeed: 3", Hires upscale: 2', {"Hires prompt": "a,\nSeed: 3", "Hires upscale": "2"}),
        ('Lora hashes: "a: 1, b: 2"', {"Lora hashes": "a: 1, b: 2"}),
        ('Hashes: {"model": "ab", "Seed": 7}', {"Hashes": '{"model": "ab", "Seed": 7}'}),
        (
            'Civitai resources: [{"type":"checkpoint","Steps":9}], Civitai metadata: {}',
            {"Civitai resources": '[{"type":"checkpoint","Steps":9}]', "Civitai metadata": "{}"},
        ),
        ("Skip layers: [7, 8, 9, ], RNG: NV", {"Skip layers": "[7, 8, 9, ]", "RNG": "NV"}),
        ("TE: a, TE: b", {"TE": "b", "TE (given before)": "a"}),
        ("Odd: [never closed, RNG: NV", {"Odd": "[never closed", "RNG": "NV"}),
        ("RNG: NV\nTemplate: x\ny\nNegative Template: z", {"RNG": "NV", "Template": "x\ny", "Negative Template": "z"}),
        ("RNG: NV\nsaved by somebody", {"RNG": "NV", "notes": "saved by somebody"}),
        ("RNG: NV\n\nVersion: 3 of them", {"RNG": "NV", "Version": "3 of them"}),
    ],
)  # fmt: skip
def test_every_parameter_is_read_or_named(more: str, unmapped: dict[str, str]) -> None:
    found = read_tool_record({"parameters": write.a1111("a lighthouse at dusk", "blurry", PAIRS) + f", {more}"})
    assert {name: getattr(found.request, name) for name in READ} == READ
    assert found.unmapped == unmapped


@pytest.mark.parametrize(
    "text",
    [
        TEXT.replace("\n", "\r\n"),
        TEXT.replace("\n", " "),
        TEXT.replace("6.5, Seed", "6.5,\nSeed"),
        TEXT.replace("Steps: 22, Sampler: Euler a, ", "").replace("CFG", "Sampler: Euler a, Steps: 22, CFG"),
        TEXT.replace("Steps: 22, ", "").replace("Size: 512x640", "Size: 512x640, Steps: 22") + "\nTemplate: x",
        TEXT + "\nSteps of the work: none",
    ],
)
def test_the_parameters_are_found_wherever_they_stand(text: str) -> None:
    request = read_tool_record({"parameters": text}).request
    assert {name: getattr(request, name) for name in READ} == READ


def test_json_that_is_cut_off_is_no_prompt() -> None:
    for text in ('{"sui_image_params": {"prompt": "a c', '[{"a": NaN}, {', '{"prompt": "x", "y": NaN}', '{\n "a": 1'):
        assert read_tool_record({"parameters": text}) is None


def test_tags_of_every_kind_leave_the_prompt() -> None:
    prompt = "a <lora:ink:0.5> fox <hypernet:old:1> <lyco:soft:0.7> <x:y> <lora:a:0.5:lbw=1,0:step=3>"
    found = read_tool_record({"parameters": write.a1111(prompt, "no <lora:ink:1>", PAIRS)})
    assert found.request.prompt == "a fox"
    assert [str(ref) for ref in found.request.loras] == ["ink:0.5", "soft:0.7"]
    assert "<hypernet:old:1>" in found.unmapped["tags"]
    assert "<x:y>" in found.unmapped["tags"]
    assert found.unmapped["lora"].startswith("<lora:a:0.5:lbw=1,0:step=3>")
    assert read_tags(found.request.negative_prompt).refused == ()
    assert spans(found.request.negative_prompt) == [("no <lora:ink:1>", 1.0)]


@pytest.mark.parametrize(
    ("more", "prompt", "meant"),
    [
        (
            {"Version": "stable-diffusion.cpp"},
            "(a:1.3) AND [b|c] [d]",
            [("a", 1.3), ("AND [b|c]", 1.0), ("d", 0.9091)],
        ),
        (
            {"App": "SD.Next", "Parser": "compel"},
            "a fox++ (b c)0.5",
            [("a", 1.0), ("fox", 1.21), ("b c", 0.5)],
        ),
        ({"App": "SD.Next", "Parser": "fixed"}, "(a:1.3) [b]", [("(a:1.3) [b]", 1.0)]),
        ({"Version": "Fooocus v2.5.5"}, "(a:1.3) AND [b|c]", [("a", 1.3), ("AND [b|c]", 1.0)]),
    ],
)
def test_texts_with_the_syntax_of_another_tool_mean_the_same_here(
    more: dict[str, str], prompt: str, meant: list[tuple[str, float]]
) -> None:
    found = read_tool_record({"parameters": write.a1111(prompt, "", {**PAIRS, **more})})
    assert spans(found.request.prompt) == meant


@pytest.mark.parametrize(
    ("more", "scheduler"),
    [
        ({"Version": "Fooocus v2.5.5", "Scheduler": "karras"}, None),
        ({"Version": "Fooocus v2.5.5", "Scheduler": "normal"}, "euler-a"),
        ({"App": "SD.Next", "Sampler sigma": "karras"}, None),
        ({"Version": "f2.0.1"}, "euler-a"),
    ],
)
def test_a_sampler_is_taken_over_only_with_its_schedule(more: dict[str, str], scheduler: str | None) -> None:
    found = read_tool_record({"parameters": write.a1111("a fox", "", {**PAIRS, **more})})
    assert found.request.scheduler == scheduler
    assert ("Sampler" in found.unmapped) == (scheduler is None)


def test_a_variation_seed_without_its_strength_is_named() -> None:
    found = read_tool_record({"parameters": write.a1111("a fox", "", {**PAIRS, "Variation seed": 5})})
    assert (found.request.variation_seed, found.unmapped) == (None, {"variation_seed": "5"})


def test_stable_diffusion_cpp_is_read() -> None:
    text = write.stable_diffusion_cpp("a fox", "ugly", seed=5, steps=9, scale=6.5, size=(64, 72))
    found = read_tool_record({"parameters": text})
    assert (found.request.scheduler, found.request.guidance_scale, found.request.height) == ("dpmpp-2m-karras", 6.5, 72)
    assert found.unmapped["TE"] == "t5xxl.safetensors"
    assert found.unmapped["TE (given before)"] == "clip_l.safetensors"


# InvokeAI


@pytest.mark.parametrize(
    ("prompt", "meant"),
    [
        ("a fox++", [("a", 1.0), ("fox", 1.21)]),
        ("(oil painting)1.3", [("oil painting", 1.3)]),
        ("(a b)+", [("a b", 1.1)]),
        ("(a (b)1.5)2", [("a", 2.0), ("b", 3.0)]),
        ('"red fox"-- runs', [("red fox", 0.81), ("runs", 1.0)]),
        ("(only a group) [x|y]", [("only a group [x|y]", 1.0)]),
        ("black AND white, BREAK", [("black AND white, BREAK", 1.0)]),
        ("\\(literal\\), 5-10 trip-hop", [("(literal), 5-10 trip-hop", 1.0)]),
        ("(a = b)++", [("(a = b)++", 1.0)]),
        ("(a b) 1.3", [("a b 1.3", 1.0)]),
        ("((((", [("((((", 1.0)]),
        ("(fox).attend(1.4)", [("fox", 1.4)]),
        ("", []),
    ],
)
def test_invokeais_prompt_means_the_same_here(prompt: str, meant: list[tuple[str, float]]) -> None:
    assert spans(from_compel(prompt).text) == meant


def test_invokeais_operators_are_converted_or_named() -> None:
    assert from_compel('("a fox+", "in snow").and()').text == "a (fox:1.1) BREAK in snow"
    assert from_compel("withLora(ink, 0.8) a fox").loras == [{"path": "ink", "unet_weight": 0.8, "text_weight": 0.8}]
    for prompt, name in [
        ('("a", "b").and(1, 0.5)', ".and()"), ('("a", "b").blend(1, 1)', ".blend()"), ("a (cat).swap(dog)", ".swap()"),
    ]:  # fmt: skip
        found = from_compel(prompt)
        assert name in found.kept
        assert spans(found.text) == [(prompt, 1.0)]


def test_invokeais_record_of_today_maps() -> None:
    record = {
        "positive_prompt": "a fox+ AND", "negative_prompt": "(ugly)1.2", "seed": 5, "clip_skip": 1,
        "loras": [{"model": {"key": "x"}, "weight": 0.5}], "steps": 30, "rand_device": "cpu",
    }  # fmt: skip
    found = read_tool_record({"invokeai_metadata": json.dumps(record)})
    assert (found.request.clip_skip, found.request.negative_prompt) == (2, "(ugly:1.2)")
    assert set(found.unmapped) == {"loras", "rand_device", "prompt syntax"}


def test_loras_are_taken_over_by_name_or_all_are_named() -> None:
    listed = [{"model": {"name": "ink"}, "weight": 0.5}, {"lora": {"model_name": "soft"}, "weight": 1}]
    found = read_tool_record({"invokeai_metadata": json.dumps({"positive_prompt": "a", "seed": 1, "loras": listed})})
    assert [str(ref) for ref in found.request.loras] == ["ink:0.5", "soft:1"]
    listed[1]["weight"] = None
    found = read_tool_record({"invokeai_metadata": json.dumps({"positive_prompt": "a", "seed": 1, "loras": listed})})
    assert (found.request.loras, found.unmapped) == ((), {"loras": listed})
    record = {
        "prompt": "a",
        "base_model": "m",
        "styles": "[]",
        "loras": [["ink", 0.1, "ab"]],
        "lora_combined_1": "ink : 0.1",
    }
    found = read_tool_record({"parameters": json.dumps(record)})
    assert [str(ref) for ref in found.request.loras] == ["ink:0.1"]
    assert found.unmapped == {"base_model": "m", "styles": "[]"}


def test_invokeais_command_line_is_read() -> None:
    found = read_tool_record(
        {"Dream": '"a fox [ugly] \\"x\\"" -s 50 -S 42 -W512 -H 640 -C 7.5 -A k_euler_a -G 0.8 --seamless'}
    )
    assert found.tool == "invokeai"
    request = found.request
    assert (request.prompt, request.negative_prompt) == ("a fox  x", "ugly")
    assert (request.steps, request.seed, request.width, request.height) == (50, 42, 512, 640)
    assert (request.guidance_scale, request.scheduler) == (7.5, "euler-a")
    assert found.unmapped == {"-G": "0.8", "--seamless": "given"}
    assert read_tool_record({"Dream": "a dream of a fox"}) is None


# the others


def test_swarmuis_tags_and_lists_are_read_or_named() -> None:
    params = {
        "prompt": "a (fox:1.3)<break>[b|c] <random:x,y> <segment:face> smile", "negativeprompt": "", "seed": 1,
        "steps": 3,
        "loras": ["ink"], "loraweights": ["0.5"], "sampler": "dpmpp_2m", "scheduler": "karras", "vae": "x",
        "variationseed": 7,
    }  # fmt: skip
    found = read_tool_record(
        {"parameters": json.dumps({"sui_image_params": params, "sui_extra_data": {"date": "now"}})}
    )
    assert found.request.prompt == "a (fox:1.3) BREAK \\[b|c\\]"
    assert [str(ref) for ref in found.request.loras] == ["ink:0.5"]
    assert found.request.scheduler == "dpmpp-2m-karras"
    assert found.unmapped == {
        "prompt: segment": "<segment:face> smile", "prompt: tags": ["<random:x,y>"], "vae": "x", "variation_seed": 7,
        "prompt: syntax": "kept as text: [ ]", "sui_extra_data": {"date": "now"},
    }  # fmt: skip


@pytest.mark.parametrize("prompt", ["(fox:5000) x", "(" * 300 + ")" * 300])
def test_weights_that_cannot_be_are_text_and_named(prompt: str) -> None:
    swarm = {"sui_image_params": {"prompt": prompt, "steps": 3}}
    fooocus = {"prompt": prompt, "base_model": "m", "styles": "[]", "steps": 3}
    text = write.a1111(prompt, "", {**PAIRS, "Version": "Fooocus v2.5.5"})
    for record in (json.dumps(swarm), json.dumps(fooocus), text):
        found = read_tool_record({"parameters": record})
        assert spans(found.request.prompt) == [(prompt, 1.0)]
        assert "kept as text: all of it: " in str(found.unmapped)


def test_a_lora_in_a_prompt_of_swarmui_is_taken_over_once() -> None:
    params: dict[str, Any] = {"prompt": "a fox <lora:ink:0.5> <lora:bad:x>", "steps": 3}
    found = read_tool_record({"parameters": json.dumps({"sui_image_params": params})})
    assert (found.request.prompt, [str(ref) for ref in found.request.loras]) == ("a fox", ["ink:0.5"])
    assert found.unmapped["prompt: tags"][0].startswith("<lora:bad:x>")
    params |= {"loras": ["ink"], "loraweights": ["0.5"]}
    found = read_tool_record({"parameters": json.dumps({"sui_image_params": params})})
    assert [str(ref) for ref in found.request.loras] == ["ink:0.5"]


def test_fooocus_own_scheme_is_read(tmp_path: Path) -> None:
    record = {
        "prompt": "a fox", "negative_prompt": "", "full_prompt": ["cinematic still a fox", "sharp"],
        "full_negative_prompt": ["anime"], "styles": "['Fooocus V2']", "performance": "Speed", "steps": 30,
        "resolution": "(1152, 896)", "guidance_scale": 4.0, "base_model": "juggernaut", "sampler": "euler",
        "scheduler": "normal", "seed": "5", "lora_combined_1": "offset : 0.1", "clip_skip": 2,
    }  # fmt: skip
    chunks = [
        write.text_chunk("parameters", json.dumps(record).encode()),
        write.text_chunk("fooocus_scheme", b"fooocus"),
    ]
    info = read(tmp_path, write.png(*chunks))
    assert info.source == "fooocus"
    assert fields(info) == {
        "prompt": "cinematic still a fox, sharp", "negative_prompt": "anime", "seed": 5, "steps": 30, "width": 1152,
        "height": 896, "guidance_scale": 4.0, "scheduler": "euler", "clip_skip": 2,
    }  # fmt: skip
    assert set(info.unmapped) == {"prompt as typed", "styles", "performance", "base_model", "lora_combined_1"}


def novelai(prompt: str, uc: str) -> dict[str, str]:
    comment = {
        "prompt": prompt, "uc": uc, "steps": 28, "scale": 5.5, "seed": 5, "width": 64, "height": 128,
        "sampler": "k_euler_ancestral", "sm": False, "noise_schedule": "native", "strength": 0.7,
    }  # fmt: skip
    return {"Title": "AI generated image", "Description": prompt, "Software": "NovelAI", "Comment": json.dumps(comment)}


@pytest.mark.parametrize("hidden", [False, True])
def test_novelais_record_is_read_from_chunks_and_from_the_transparency(tmp_path: Path, hidden: bool) -> None:
    texts = novelai("{{fox}}, [snow] (x)", "")
    if hidden:
        data = write.stealth(json.dumps(texts))
    else:
        data = write.png(*[write.text_chunk(key, text.encode()) for key, text in texts.items()])
    info = read(tmp_path, data)
    assert info.source == "novelai"
    found = fields(info)
    assert spans(found.pop("prompt")) == [("fox", 1.1025), (",", 1.0), ("snow", 0.9524), ("(x)", 1.0)]
    assert found == {
        "negative_prompt": "", "seed": 5, "steps": 28, "width": 64, "height": 128, "guidance_scale": 5.5,
        "scheduler": "euler-a",
    }  # fmt: skip
    assert info.unmapped == {"Title": "AI generated image", "sm": False, "strength": 0.7}


@pytest.mark.parametrize(
    ("prompt", "meant"),
    [
        ("1.5::red fox, snow::, 12:30", [("red fox, snow", 1.5), (", 12:30", 1.0)]),
        ("-2::fog::", [("fog", -2.0)]),
        ("{a [b]}", [("a", 1.05), ("b", 1.0)]),
        ("}{ a", [("}{ a", 1.0)]),
        ("2::{x}", [("x", 2.1)]),
    ],
)
def test_novelais_weights_mean_the_same_here(prompt: str, meant: list[tuple[str, float]]) -> None:
    assert spans(from_novelai(prompt)[0]) == meant


@pytest.mark.parametrize(("channels", "packed"), [(1, True), (1, False), (3, True), (3, False)])
def test_texts_hidden_in_pixels_are_read(tmp_path: Path, channels: int, packed: bool) -> None:
    info = read(tmp_path, write.stealth(TEXT, channels=channels, packed=packed))
    assert (info.source, fields(info)) == ("a1111", READ)


def test_a_hidden_bomb_is_no_text(tmp_path: Path) -> None:
    info = read(tmp_path, write.stealth("x" * 8 * 2**20))
    assert len(info.parameters or "") <= 4 * 2**20


EASY = {
    "prompt": "a (fox)", "negative_prompt": "ugly", "seed": 5, "num_inference_steps": 9, "guidance_scale": 7.5,
    "width": 64, "height": 128, "sampler_name": "euler_a", "use_stable_diffusion_model": "m", "use_vae_model": None,
    "clip_skip": False, "use_upscale": "RealESRGAN",
}  # fmt: skip


def test_easy_diffusions_chunks_and_its_json_are_the_same_record(tmp_path: Path) -> None:
    chunks = [write.text_chunk(key, str(value).encode()) for key, value in EASY.items()]
    for data in (write.png(*chunks), write.commented(b"UNICODE\0" + json.dumps(EASY).encode("utf-16-be"))):
        info = read(tmp_path, data)
        assert info.source == "easy-diffusion"
        assert fields(info) == {
            "prompt": "a \\(fox\\)", "negative_prompt": "ugly", "seed": 5, "steps": 9, "guidance_scale": 7.5,
            "width": 64, "height": 128, "scheduler": "euler-a",
        }  # fmt: skip
        assert set(info.unmapped) == {"use_stable_diffusion_model", "use_upscale", "prompt syntax"}


def test_draw_things_is_read_in_every_format(tmp_path: Path) -> None:
    packet = write.draw_things(
        "a [fox] AND [x|y]", "ugly", seed=5, steps=3, sampler="DPM++ 2M Karras", size="64x72", scale=4
    )
    jpeg_xmp = (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + packet)
    png_xmp = write.text_chunk("XML:com.adobe.xmp", packet, "iTXt")
    for data in (write.png(png_xmp), write.jpeg(jpeg_xmp), write.webp(xmp=packet)):
        info = read(tmp_path, data)
        assert info.source == "draw-things"
        found = fields(info)
        assert spans(found.pop("prompt")) == [("a", 1.0), ("fox", 0.9091), ("AND [x|y]", 1.0)]
        assert found == {
            "negative_prompt": "ugly", "seed": 5, "steps": 3, "width": 64, "height": 72, "guidance_scale": 4,
            "scheduler": "dpmpp-2m-karras",
        }  # fmt: skip


def test_other_texts_beside_a_record_are_named(tmp_path: Path) -> None:
    graph = json.dumps({"seed": 5, "positive_prompt": "a fox"})
    chunks = [write.text_chunk("invokeai_metadata", graph.encode()), write.text_chunk("invokeai_graph", b"{}")]
    assert read(tmp_path, write.png(*chunks)).unmapped == {"other texts": ["invokeai_graph"]}


def test_damaged_exif_is_told(tmp_path: Path) -> None:
    data = write.commented(b"UNICODE\0" + TEXT.encode("utf-16-be"))
    place = data.index(b"Exif\0\0MM") + 10
    hurt = data[:place] + struct.pack(">I", 2**31) + data[place + 4 :]
    info = read(tmp_path, hurt)
    assert info.request is None
