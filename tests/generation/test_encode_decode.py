"""`sdcli encode` and `sdcli decode`: the round trip against diffusers, streams that resume, and input of every kind."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sdcli.cli.app import app
from sdcli.errors import (
    BadImage,
    BadLatents,
    CannotWrite,
    Interrupted,
    NotFound,
    SdcliError,
    SomeFailed,
    UsageError,
)
from sdcli.io.files import AlreadyExists
from sdcli.io.lean_diffusers import AutoencoderKL, AutoencoderTiny
from sdcli.models.loader import load_model
from sdcli.models.registry import load_registry
from sdcli.vae import autoencoder
from tests.conftest import REPOSITORY, Disk, Run
from tests.faults import temporary_of
from tests.forked import Forked
from tests.tiny import save_tiny_pipeline


@dataclass(frozen=True)
class Outcome:
    """What a command printed and how it ended."""

    out: list[str]
    err: str
    error: SdcliError | None

    @property
    def json(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out]


def run(*arguments: str | Path) -> Outcome:
    """The command line in this process: a failure is the exception that `main` would print."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    error = result.exception if isinstance(result.exception, SdcliError) else None
    if result.exception is not None and error is None:
        raise result.exception
    return Outcome(result.stdout.splitlines(), result.stderr, error)


def good(*arguments: str | Path) -> list[str]:
    outcome = run(*arguments)
    assert outcome.error is None, outcome.error
    return outcome.out


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands run in `tmp_path`; the handlers they install for signals go when they are done."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def draw(path: Path, *, seed: int = 0, size: tuple[int, int] = (48, 40)) -> Path:
    """A smooth image unlike those of other seeds."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def folder_of(count: int, folder: Path = Path("pictures"), **options: Any) -> Path:
    for k in range(count):
        draw(folder / f"{k:04}.png", seed=k, **options)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tensor(path: Path | str) -> torch.Tensor:
    return load_file(path)["latent_tensor"]


def record(path: Path | str) -> dict[str, Any]:
    data = Path(path).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    found: dict[str, Any] = json.loads(header["__metadata__"]["sdcli"])
    return found


def vae_of(model: str) -> Any:
    return load_model(load_registry().find(model), dtype="float32", parts=("vae",)).vae


# The round trip


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "starter"])
def test_the_round_trip_is_that_of_diffusers_bit_for_bit(model: str) -> None:
    source = draw(Path("a.png"), size=(64, 48))
    good("encode", source, "-m", model, "-o", "a.safetensors")
    good("decode", "a.safetensors", "-o", "b.png")
    vae, processor = vae_of(model), VaeImageProcessor()
    with torch.inference_mode():
        encoded = vae.encode(processor.preprocess(Image.open(source)))
        expected = encoded.latents if isinstance(vae, AutoencoderTiny) else encoded.latent_dist.mode()
        # contiguous, as latents come out of a file: convolutions round otherwise for the layout that encode leaves
        decoded = processor.postprocess(vae.decode(expected.contiguous()).sample)[0]
    assert torch.equal(tensor("a.safetensors"), expected)
    assert Image.open("b.png").tobytes() == decoded.tobytes()


def test_a_sample_is_drawn_as_diffusers_does_with_a_seed_of_the_image_itself() -> None:
    from sdcli.generation.encode_files import seed_of

    folder = folder_of(2)
    good("encode", folder, "-m", "tiny", "--sample", "--seed", "5")
    (both,) = good("encode", folder, "-m", "tiny", "--sample", "--seed", "5", "--pack", "--outdir", "packed")
    vae, processor = vae_of("tiny"), VaeImageProcessor()
    for k in (0, 1):
        path = folder / f"{k:04}.png"
        seed = seed_of(5, hashlib.sha256(path.read_bytes()).hexdigest())
        with torch.inference_mode():
            distribution = vae.encode(processor.preprocess(Image.open(path))).latent_dist
            expected = distribution.sample(torch.Generator().manual_seed(seed))
        assert torch.allclose(tensor(f"latents/{k:04}.safetensors"), expected, atol=1e-6)
        assert torch.equal(tensor(both)[k : k + 1], tensor(f"latents/{k:04}.safetensors"))
        assert (tensor(f"latents/{k:04}.safetensors") - distribution.mode()).abs().max() > 0.01
    assert record(both)["sample"] == "sample"
    assert record(both)["seed"] == 5


def test_a_file_says_what_it_is() -> None:
    source = draw(Path("a.png"), size=(53, 44))
    good("encode", source, "-m", "starter", "-o", "a.safetensors")
    found = record("a.safetensors")
    vae_file = REPOSITORY / "sdcli/starter/vae/diffusion_pytorch_model.safetensors"
    assert found == {
        "schema": 1,
        "kind": "latents",
        "model": "starter",
        "vae": f"sha256:{hashlib.sha256(vae_file.read_bytes()).hexdigest()}",
        "scaling_factor": autoencoder.scaling_factor(vae_of("starter")),
        "scaled": False,
        "sample": "mean",
        "seed": None,
        "size": None,
        "dtype": "float32",
        "stored": "float32",
        "source": [
            {
                "name": "a.png",
                "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
                "width": 53,
                "height": 44,
                "fitted_width": 48,
                "fitted_height": 32,
                "fit": "crop",
                "fallbacks": [],
            }
        ],
    }


@pytest.mark.slow
def test_half_precision_is_the_same_up_to_its_rounding() -> None:
    source = draw(Path("a.png"))
    good("encode", source, "-o", "full.safetensors")
    good("encode", source, "-o", "half.safetensors", "--half")
    full, half = tensor("full.safetensors"), tensor("half.safetensors")
    assert half.dtype == torch.float16
    assert torch.equal(half, full.half())
    good("decode", "full.safetensors", "half.safetensors")
    pixels = [np.asarray(Image.open(f"outputs/{name}.png")).astype(int) for name in ("full", "half")]
    assert np.abs(pixels[0] - pixels[1]).max() <= 3
    assert Path("half.safetensors").stat().st_size < Path("full.safetensors").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_latents_do_not_depend_on_their_batch_or_their_file(batch_size: int) -> None:
    folder = folder_of(5)
    good("encode", folder, "-m", "tiny", "--outdir", "alone")
    good("encode", folder, "-m", "tiny", "--outdir", "together", "--batch-size", str(batch_size))
    packs = good("encode", folder, "-m", "tiny", "--outdir", "packed", "--pack", "--batch-size", str(batch_size))
    assert packs == [f"packed/pack-{n + 1:05}.safetensors" for n in range(math.ceil(5 / batch_size))]
    alone = torch.cat([tensor(f"alone/{k:04}.safetensors") for k in range(5)])
    assert torch.allclose(torch.cat([tensor(f"together/{k:04}.safetensors") for k in range(5)]), alone, atol=1e-4)
    assert torch.allclose(torch.cat([tensor(path) for path in packs]), alone, atol=1e-4)


@pytest.mark.slow
def test_a_packed_file_is_decoded_to_one_image_each() -> None:
    folder = folder_of(3)
    good("encode", folder, "-m", "tiny", "--pack", "-o", "all.safetensors")
    good("encode", folder, "-m", "tiny")
    assert good("decode", "all.safetensors") == [f"outputs/all-{n}.png" for n in (1, 2, 3)]
    good("decode", "latents", "--outdir", "single")
    for k in range(3):
        assert Path(f"outputs/all-{k + 1}.png").read_bytes() == Path(f"single/{k:04}.png").read_bytes()
    assert isinstance(run("decode", "all.safetensors", "-o", "one.png").error, UsageError)
    Path("outputs/all-2.png").unlink()
    Path("outputs/all-3.png").unlink()
    again = run("decode", "all.safetensors")  # the first is there, and its failure is told like any other
    assert (again.out, len(again.err.splitlines())) == (["outputs/all-2.png", "outputs/all-3.png"], 1)
    assert "outputs/all-1.png" in again.err


def test_an_empty_folder_is_told_before_the_first_image() -> None:
    folder = folder_of(2)
    Path("empty").mkdir()
    outcome = run("encode", folder, "empty", "-m", "tiny")
    assert (outcome.out, type(outcome.error)) == ([], NotFound)


@pytest.mark.slow
def test_only_neighbours_of_equal_size_share_a_pack() -> None:
    for k, size in enumerate([(48, 40), (48, 40), (40, 48), (48, 40)]):
        draw(Path(f"pictures/{k}.png"), seed=k, size=size)
    packs = good("encode", "pictures", "-m", "tiny", "--pack")
    assert [tuple(tensor(path).shape) for path in packs] == [(2, 4, 5, 6), (1, 4, 6, 5), (1, 4, 5, 6)]
    outcome = run("encode", "pictures", "-m", "tiny", "--pack", "-o", "all.safetensors")
    assert isinstance(outcome.error, SomeFailed)
    assert "--size makes them equal" in outcome.err
    assert [source["name"] for source in record("all.safetensors")["source"]] == ["0.png", "1.png", "3.png"]


@pytest.mark.slow
def test_the_checks_psnr_is_what_the_files_really_lose() -> None:
    folder = folder_of(2, size=(53, 47))
    lines = run("encode", folder, "--size", "48x32", "--fit", "pad", "--half", "--check", "--json").json
    good("decode", "latents")
    found = []
    for k in (0, 1):
        before = Image.open(folder / f"{k:04}.png")
        scale = min(48 / before.width, 32 / before.height)
        fitted = Image.new("RGB", (48, 32), "black")
        inner = before.resize((round(before.width * scale), round(before.height * scale)), Image.Resampling.LANCZOS)
        fitted.paste(inner, ((48 - inner.width) // 2, (32 - inner.height) // 2))
        error = np.asarray(fitted, dtype=float) - np.asarray(Image.open(f"outputs/{k:04}.png"), dtype=float)
        found.append(10 * math.log10(255**2 / np.mean(error**2)))
    assert [line["psnr"] for line in lines[:2]] == pytest.approx(found, abs=1e-3)
    assert lines[2] == {"status": "summary", "pictures": 2, "mean_psnr": pytest.approx(sum(found) / 2, abs=1e-3)}
    again = good("encode", folder, "--size", "48x32", "--fit", "pad", "--half", "--check")
    assert again[0] == f"latents/0000.safetensors\t{found[0]:.2f} dB"
    assert again[2].startswith("mean PSNR")


@pytest.mark.parametrize("how", ["crop", "pad", "stretch"])
def test_every_fit_makes_the_size_that_was_asked_for(how: str) -> None:
    draw(Path("a.jpg"), size=(90, 50))
    good("encode", "a.jpg", "-m", "tiny", "--size", "32x48", "--fit", how, "-o", "a.safetensors")
    assert tensor("a.safetensors").shape == (1, 4, 6, 4)
    (source,) = record("a.safetensors")["source"]
    assert (source["width"], source["height"], source["fit"]) == (90, 50, how)
    assert record("a.safetensors")["size"] == [32, 48]


@pytest.mark.slow
def test_a_vae_with_larger_cells_gets_whole_ones() -> None:
    folder = save_tiny_pipeline(Path("large-cells").resolve())
    shutil.rmtree(folder / "vae")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 5, "up_block_types": ("UpDecoderBlock2D",) * 5}
    AutoencoderKL(block_out_channels=(8,) * 5, norm_num_groups=4, **blocks).save_pretrained(folder / "vae")
    draw(Path("a.png"), size=(57, 40))
    (line, _) = run("encode", "a.png", "-m", folder, "--check", "--json", "-o", "a.safetensors").json
    assert math.isfinite(line["psnr"])
    assert tensor("a.safetensors").shape == (1, 4, 2, 3)
    good("decode", "a.safetensors", "-m", folder, "-o", "b.png")
    assert Image.open("b.png").size == (48, 32)
    refused = run("encode", "a.png", "-m", folder, "--size", "40x32", "-o", "c.safetensors")
    assert isinstance(refused.error, UsageError)
    assert "multiples of 16" in str(refused.error)


# Streams


@pytest.mark.slow
def test_names_never_collide() -> None:
    for k, name in enumerate(("x/a.png", "x/A.webp", "x/b.png", "x/deep/a.png", "y/a.png", "y/a-2.png")):
        draw(Path(name), seed=k)
    (Path("x") / ".hidden.png").write_bytes(b"")
    Path("x/notes.txt").write_text("no image")
    lines = run("encode", "x", "y", "x/b.png", "-m", "tiny", "--json").json
    assert {line["source"]: line["path"] for line in lines} == {
        "x/A.webp": "latents/A.webp.safetensors",
        "x/a.png": "latents/a.png.safetensors",
        "x/b.png": "latents/b-2.safetensors",
        "x/deep/a.png": "latents/deep/a.safetensors",
        "y/a-2.png": "latents/a-2.safetensors",
        "y/a.png": "latents/a.safetensors",
    }
    assert lines[2]["path"] == "latents/b.safetensors"
    assert len(digests(Path("latents"))) == 7
    assert len(good("decode", "latents")) == len(digests(Path("outputs"))) == 7


@pytest.mark.slow
def test_names_too_long_for_another_suffix_are_cut_and_still_tell_their_images_apart() -> None:
    longest = ["l" * 251, "l" * 250 + "m", "\N{CJK UNIFIED IDEOGRAPH-6F22}" * 83]
    for k, name in enumerate(longest):
        draw(Path("pictures") / f"{name}.png", seed=k)
    draw(Path("pictures/z.png"), seed=9)
    lines = run("encode", "pictures", "-m", "tiny", "--json").json
    assert [line["status"] for line in lines] == ["done"] * 4
    assert len({line["path"] for line in lines}) == 4
    assert all(len(os.fsencode(Path(line["path"]).name)) <= 255 for line in lines)
    assert [line["status"] for line in run("encode", "pictures", "-m", "tiny", "--json").json] == ["skipped"] * 4
    assert len(good("decode", "latents", "--format", "webp")) == len(digests(Path("outputs"))) == 4


@pytest.mark.slow
def test_a_second_run_skips_what_is_there_and_encodes_what_changed() -> None:
    folder = folder_of(3)
    first = good("encode", folder, "-m", "tiny")
    before = digests(Path("latents"))
    times = {path: os.stat(path).st_mtime_ns for path in first}
    Path(first[1]).unlink()
    outcome = run("encode", folder, "-m", "tiny")
    assert outcome.out == [first[1]]
    assert f"{first[0]} exists already" in outcome.err
    assert digests(Path("latents")) == before
    assert os.stat(first[0]).st_mtime_ns == times[first[0]]

    draw(folder / "0001.png", seed=9)
    outcome = run("encode", folder, "-m", "tiny", "--json")
    assert [line["status"] for line in outcome.json] == ["skipped", "failed", "skipped"]
    assert outcome.json[1]["exit_code"] == 8
    assert isinstance(outcome.error, SomeFailed)
    assert good("encode", folder, "-m", "tiny", "--overwrite") == [first[1]]
    assert digests(Path("latents"))["0000.safetensors"] == before["0000.safetensors"]
    assert digests(Path("latents"))["0001.safetensors"] != before["0001.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        ["--half"],
        ["--size", "32x32"],
        ["--size", "48x40"],
        ["--sample"],
        ["-m", "other"],
        ["--dtype", "bfloat16"],
    ],
)
def test_other_settings_never_pass_for_the_same(change: list[str]) -> None:
    registry = Path("models.yaml")
    registry.write_text("models: {other: {source: {kind: random, architecture: tiny, seed: 1}}}")
    base: list[str | Path] = ["encode", draw(Path("a.png")), "--models-file", registry]
    model = [] if "-m" in change else ["-m", "tiny"]
    good(*base, "-m", "tiny")
    outcome = run(*base, *model, *change)
    assert isinstance(outcome.error, AlreadyExists)
    assert "--overwrite replaces it" in str(outcome.error)
    assert good(*base, *model, *change, "--overwrite") == ["latents/a.safetensors"]
    assert good(*base, *model, *change) == []


@pytest.mark.slow
def test_packs_resume_as_well() -> None:
    folder = folder_of(5)
    arguments: list[str | Path] = ["encode", folder, "-m", "tiny", "--pack", "--batch-size", "2"]
    packs = good(*arguments)
    before = digests(Path("latents"))
    Path(packs[1]).unlink()
    assert [line["status"] for line in run(*arguments, "--json").json] == ["skipped"] * 2 + ["done"] * 2 + ["skipped"]
    assert digests(Path("latents")) == before
    (folder / "0000.png").unlink()
    assert isinstance(run(*arguments).error, SomeFailed)
    assert digests(Path("latents")) == before


@pytest.mark.slow
def test_one_unreadable_image_is_reported_and_the_rest_goes_on() -> None:
    folder = folder_of(3)
    data = (folder / "0001.png").read_bytes()
    (folder / "0001.png").write_bytes(data[: len(data) // 2])
    outcome = run("encode", folder, Path("absent.png"), "-m", "tiny", "--json")
    assert isinstance(outcome.error, SomeFailed)
    assert outcome.error.exit_code == 7
    assert [(line["status"], line.get("exit_code")) for line in outcome.json] == [
        ("done", None), ("failed", 1), ("done", None), ("failed", 3),
    ]  # fmt: skip
    assert "0001.png: cannot be read" in outcome.err
    alone = run("encode", folder / "0001.png", "-m", "tiny")
    assert isinstance(alone.error, BadImage)
    assert "warning" not in alone.err
    assert isinstance(run("encode", "absent.png", "-m", "tiny").error, NotFound)


def test_a_folder_without_images_is_said() -> None:
    """It is no success with nothing to show."""
    Path("empty").mkdir()
    assert isinstance(run("encode", "empty", "-m", "tiny").error, NotFound)
    assert isinstance(run("decode", "empty", "-m", "tiny").error, NotFound)


def test_a_signal_ends_the_stream_after_the_image_in_hand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sdcli.generation.loaded_vae import LoadedVae

    folder = folder_of(4)
    encode = LoadedVae.encode
    calls: list[int] = []

    def interrupted(self: LoadedVae, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return encode(self, *arguments, **options)

    monkeypatch.setattr(LoadedVae, "encode", interrupted)
    with pytest.raises(Interrupted):
        typer.main.get_command(app).main(["encode", str(folder), "-m", "tiny"], standalone_mode=False)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["latents/0000.safetensors", "latents/0001.safetensors"]
    assert "stopping after the current image" in printed.err


@pytest.mark.slow
def test_a_killed_run_leaves_whole_files_and_the_next_one_completes_them() -> None:
    folder = folder_of(60)
    good("encode", folder, "-m", "tiny", "--outdir", "expected")
    process = Forked(["encode", str(folder), "-m", "tiny", "-q"], cwd=Path.cwd())
    for _ in range(7):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    temporary_of(process.pid, Path("latents")).write_bytes(b"half a file")
    there = list(Path("latents").glob("*.safetensors"))
    assert 7 <= len(there) < 60
    for path in there:
        assert path.read_bytes() == (Path("expected") / path.name).read_bytes()
    good("encode", folder, "-m", "tiny")
    assert digests(Path("latents")) == digests(Path("expected"))


@pytest.mark.slow
def test_a_terminated_run_prints_exactly_what_it_leaves_on_the_disk() -> None:
    folder = folder_of(200, size=(16, 16))
    process = Forked(["encode", str(folder), "-m", "tiny"], cwd=Path.cwd())
    first = [process.stdout.readline().strip() for _ in range(3)]
    process.send_signal(signal.SIGTERM)
    rest, talk = process.communicate(timeout=60)
    assert process.returncode == 143, talk
    assert "Traceback" not in talk
    printed = first + rest.splitlines()
    assert 3 <= len(printed) < 200
    assert sorted(printed) == sorted(str(path) for path in Path("latents").iterdir())
    for path in printed:
        assert tensor(path).shape == (1, 4, 2, 2)


@pytest.mark.slow
def test_a_thousand_images_stream_in_constant_memory(sdcli: Run, tmp_path: Path) -> None:
    script = (
        "import resource, sys\n"
        "from sdcli.cli.app import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
    )

    def peak(count: int) -> int:
        first = draw(tmp_path / f"n{count}" / "0.png", size=(256, 256))
        for k in range(1, count):
            shutil.copy(first, first.with_name(f"{k}.png"))
        command = [sys.executable, "-c", script, "encode", str(first.parent), "-m", "tiny", "--size", "16x16", "-q"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=first.parent.parent, env=environment)
        assert len(done.stdout.splitlines()) == count, done.stderr
        shutil.rmtree(tmp_path / "latents")
        return int(done.stderr.split()[-1])

    assert peak(1000) - peak(50) < 40_000  # KiB; 1,000 held images would be 200 MB


# Latents from elsewhere


@pytest.mark.slow
def test_latents_of_comfyui_and_diffusers_decode_to_the_same_image() -> None:
    good("encode", draw(Path("a.png")), "-m", "tiny", "-o", "ours.safetensors")
    raw = tensor("ours.safetensors")
    factor = autoencoder.scaling_factor(vae_of("tiny"))
    save_file({"latent_tensor": raw, "latent_format_version_0": torch.tensor([])}, "marked.latent")
    save_file({"latent_tensor": raw * 0.18215}, "unmarked.latent")
    save_file({"x": raw}, "plain.safetensors")
    np.save("scaled.npy", (raw * factor).numpy())
    good("decode", "ours.safetensors", "marked.latent", "unmarked.latent", "-m", "tiny")
    good("decode", "plain.safetensors", "--unscaled", "-m", "tiny")
    good("decode", "scaled.npy", "--scaled", "-m", "tiny")
    expected = np.asarray(Image.open("outputs/ours.png")).astype(int)
    for name in ("marked", "unmarked", "plain", "scaled"):
        assert np.abs(np.asarray(Image.open(f"outputs/{name}.png")) - expected).max() <= 1, name
    assert isinstance(run("decode", "plain.safetensors", "-m", "tiny").error, UsageError)


@pytest.mark.slow
def test_the_model_comes_from_the_file_but_never_a_path() -> None:
    good("encode", draw(Path("a.png")), "-m", "tiny", "-o", "a.safetensors")
    (line,) = run("decode", "a.safetensors", "--json").json
    assert line["model"] == "tiny"
    assert line["notes"] == []
    good("encode", draw(Path("b.png")), "-m", "starter", "-o", "b.safetensors")
    data = Path("b.safetensors").read_bytes()
    assert b'\\"starter\\"' in data
    Path("b.safetensors").write_bytes(data.replace(b'\\"starter\\"', b'\\"/etc/as\\"'))
    outcome = run("decode", "b.safetensors", "--json")
    assert outcome.json[0]["model"] == "starter"
    assert "models.yaml does not know" in outcome.err


@pytest.mark.slow
def test_another_vae_is_warned_about_and_other_channels_are_refused() -> None:
    good("encode", draw(Path("a.png")), "-m", "tiny", "-o", "a.safetensors")
    folder = save_tiny_pipeline(Path("other").resolve())
    outcome = run("decode", "a.safetensors", "-m", str(folder))
    assert outcome.out == ["outputs/a.png"]
    assert f"made with another VAE (random:tiny:0) than that of {folder} " in outcome.err
    np.save("sixteen.npy", np.zeros((16, 8, 8), dtype=np.float32))
    outcome = run("decode", "sixteen.npy", "--scaled", "-m", "tiny")
    assert isinstance(outcome.error, BadLatents)
    assert "16 channels; the VAE of tiny takes 4" in str(outcome.error)


@pytest.mark.slow
def test_one_bad_file_among_several_is_reported_and_skipped() -> None:
    good("encode", folder_of(2), "-m", "tiny")
    whole = Path("latents/0000.safetensors").read_bytes()
    Path("latents/broken.safetensors").write_bytes(whole[:-50])
    outcome = run("decode", "latents", "--json")
    assert isinstance(outcome.error, SomeFailed)
    assert [line["status"] for line in outcome.json] == ["done", "done", "failed"]
    assert "cut short" in outcome.json[2]["error"]
    assert isinstance(run("decode", "latents/broken.safetensors").error, BadLatents)


@pytest.mark.slow
def test_latents_of_an_image_beyond_all_bounds_are_refused() -> None:
    np.save("wide.npy", np.zeros((4, 1, 2**21), dtype=np.float16))
    assert isinstance(run("decode", "wide.npy", "--scaled", "-m", "tiny").error, BadLatents)
    np.save("long.npy", np.zeros((4, 1, 3000), dtype=np.float16))
    assert isinstance(run("decode", "long.npy", "--scaled", "-m", "tiny", "--format", "webp").error, UsageError)


@pytest.mark.slow
def test_a_black_image_survives_the_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    good("encode", draw(Path("a.png")), "-m", "tiny", "-o", "a.safetensors")
    monkeypatch.setattr(autoencoder, "decode", lambda *_, **__: torch.zeros(1, 3, 40, 48))
    assert good("decode", "a.safetensors") == ["outputs/a.png"]
    monkeypatch.setattr(autoencoder, "decode", lambda *_, **__: torch.full((1, 3, 40, 48), float("nan")))
    assert run("decode", "a.safetensors", "--overwrite").error.exit_code == 6  # type: ignore[union-attr]


# Memory


@pytest.mark.slow
def test_tiles_are_used_when_asked_for_or_when_memory_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []
    decode, encode = autoencoder.decode, autoencoder.moments

    def watched(call: Any) -> Any:
        def wrapper(*arguments: Any, tiled: bool = False, **options: Any) -> Any:
            seen.append((call is encode, tiled))
            return call(*arguments, tiled=tiled, **options)

        return wrapper

    monkeypatch.setattr(autoencoder, "decode", watched(decode))
    monkeypatch.setattr(autoencoder, "moments", watched(encode))
    draw(Path("a.png"), size=(48, 40))
    good("encode", "a.png", "-m", "tiny", "-o", "a.safetensors")
    good("decode", "a.safetensors", "-o", "plain.png")
    outcome = run("decode", "a.safetensors", "-o", "tiled.png", "--tile")
    assert "tiles" not in outcome.err
    assert seen == [(True, False), (False, False), (False, True)]
    seen.clear()
    monkeypatch.setattr(autoencoder, "fits_in_memory", lambda *_: False)
    outcome = run("encode", "a.png", "-m", "tiny", "-o", "b.safetensors", "--check")
    assert "encoded in tiles: the whole image would not fit into memory" in outcome.err
    assert record("b.safetensors")["source"][0]["fallbacks"] == [
        "encoded in tiles: the whole image would not fit into memory"
    ]
    assert "decoded in tiles" in run("decode", "b.safetensors", "-o", "b.png").err
    assert seen == [(True, True), (False, True), (False, True)]


@pytest.mark.slow
def test_a_large_image_in_tiles_is_nearly_the_same() -> None:
    good("encode", draw(Path("a.png"), size=(768, 640)), "-m", "starter", "-o", "a.safetensors")
    for name, options in (("whole", []), ("tiled", ["--tile"])):
        good("decode", "a.safetensors", "-o", f"{name}.png", *options)
    whole, tiled = (np.asarray(Image.open(f"{name}.png")).astype(int) for name in ("whole", "tiled"))
    assert whole.shape == (640, 768, 3)
    assert np.abs(whole - tiled).mean() < 3


@pytest.mark.slow
def test_out_of_memory_with_a_batch_encodes_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = autoencoder.moments

    def crowded(vae: Any, pixels: Any, **options: Any) -> Any:
        if len(pixels) > 1:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes")
        return encode(vae, pixels, **options)

    folder = folder_of(3)
    good("encode", folder, "-m", "tiny", "--outdir", "expected")
    monkeypatch.setattr(autoencoder, "moments", crowded)
    outcome = run("encode", folder, "-m", "tiny", "--batch-size", "3")
    assert "batch of 3 encoded one by one: out of memory" in outcome.err
    for k in range(3):
        name = f"{k:04}.safetensors"
        assert torch.equal(tensor(f"latents/{name}"), tensor(f"expected/{name}"))


# Wrong usage, and disks that do not take it


@pytest.mark.parametrize(
    "arguments",
    [
        ["encode", "a.png", "--seed", "1"],
        ["encode", "a.png", "--fit", "pad"],
        ["encode", "a.png", "--size", "30x30"],
        ["encode", "a.png", "--size", "0x8"],
        ["encode", "a.png", "--size", "big"],
        ["encode", "a.png", "--sample", "-m", "starter"],
        ["encode", "a.png", "a.png", "-o", "x.safetensors"],
        ["encode", ".", "-o", "x.safetensors"],
        ["encode", "a.png", "-o", "x.safetensors", "--outdir", "y"],
        ["encode", "a.png", "-o", "x.png"],
        ["decode", "a.latent", "a.latent", "-o", "x.png"],
        ["decode", "a.latent", "-o", "x.gif"],
        ["decode", "a.latent", "-o", "x.png", "--format", "webp"],
        ["decode", "a.latent", "-o", "x.png", "--outdir", "y"],
    ],
)
def test_options_that_cannot_be_honoured_are_refused(arguments: list[str]) -> None:
    draw(Path("a.png"))
    error = run(*arguments).error
    assert isinstance(error, UsageError)
    assert digests(Path()).keys() == {"a.png"}


def test_a_folder_that_cannot_be_made_ends_with_exit_8() -> None:
    draw(Path("a.png"))
    Path("file").write_text("in the way")
    for arguments in (["encode", "a.png", "--outdir", "file"], ["decode", "a.png", "-o", "file/b.png"]):
        assert isinstance(run(*arguments, "-m", "tiny").error, CannotWrite)


def test_a_folder_without_permission_ends_with_exit_8_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """As root everything is permitted but a disk that is mounted to be read."""
    from sdcli.generation.loaded_vae import LoadedVae

    monkeypatch.setattr(LoadedVae, "load", lambda *_: pytest.fail("the model was loaded"))
    draw(Path("a.png"))
    np.save("a.npy", np.zeros((4, 2, 2), dtype=np.float32))
    locked = Path("locked")
    if os.geteuid() == 0:
        disk = request.getfixturevalue("disk")
        disk.read_only()
        locked = disk.path
    else:
        locked.mkdir(mode=0o500)
    for command in (["encode", "a.png"], ["decode", "a.npy", "--scaled"]):
        error = run(*command, "--outdir", locked, "-m", "tiny").error
        assert isinstance(error, CannotWrite)
        assert "no permission to write" in str(error)


@pytest.mark.slow
def test_a_full_disk_ends_with_exit_8_and_what_was_printed_is_whole(disk: Disk) -> None:
    folder = folder_of(40, size=(16, 16))
    good("encode", folder, "-m", "tiny", "--outdir", "expected")
    disk.resize(64 << 10)
    outcome = run("encode", folder, "-m", "tiny", "--outdir", disk.path)
    assert isinstance(outcome.error, CannotWrite)
    assert outcome.error.exit_code == 8
    assert "No space left" in str(outcome.error)
    assert 1 <= len(outcome.out) < 40
    assert digests(disk.path).keys() == {Path(line).name for line in outcome.out}
    assert digests(disk.path).items() <= digests(Path("expected")).items()


@pytest.mark.slow
def test_images_are_not_overwritten_unasked() -> None:
    good("encode", draw(Path("a.png")), "-m", "tiny", "-o", "a.safetensors")
    before = digests(Path())
    assert isinstance(run("decode", "a.safetensors", "-o", "a.png").error, AlreadyExists)
    assert digests(Path()) == before
    good("decode", "a.safetensors", "-o", "a.png", "--overwrite")
    assert digests(Path())["a.png"] != before["a.png"]


@pytest.mark.slow
@pytest.mark.parametrize(("image_format", "suffix"), [("jpeg", ".jpg"), ("webp", ".webp"), ("png", ".png")])
def test_images_come_in_every_format(image_format: str, suffix: str) -> None:
    good("encode", draw(Path("a.png")), "-m", "tiny", "-o", "a.safetensors")
    (path,) = good("decode", "a.safetensors", "--format", image_format)
    assert path == f"outputs/a{suffix}"
    with Image.open(path) as image:
        assert (image.format, image.size) == (image_format.upper(), (48, 40))


@pytest.mark.slow
def test_as_a_process_the_two_commands_speak_on_the_right_streams(sdcli: Run, tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    started = time.monotonic()
    encoded = sdcli("encode", "a.png", "b.png", "-m", "tiny")
    assert (encoded.returncode, encoded.stdout) == (7, "latents/a.safetensors\n")
    assert "b.png: is not a PNG" in encoded.stderr
    decoded = sdcli("decode", "latents/a.safetensors", "-q", "-o", "c.png")
    assert (decoded.returncode, decoded.stdout, decoded.stderr) == (0, "c.png\n", "")
    assert sdcli("decode", "latents/a.safetensors", "-o", "c.png").returncode == 8
    assert time.monotonic() - started < 60
