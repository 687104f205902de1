"""`sdcli train-controlnet` on miniature networks: where maps come from, what RUN is, and that it goes on exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import load_file

from sdcli.data.conditioning_images import with_maps_of_column, with_maps_of_folder
from sdcli.data.sources import open_images
from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.sampling import sample
from sdcli.errors import NotFound, UsageError
from sdcli.generation.resolve.resolve import resolve
from sdcli.images.pixels import from_pixels, to_pixels
from sdcli.images.preprocessors import control_map
from sdcli.models.controlnet import load_controlnet, with_controlnets
from sdcli.models.loader import load_model
from sdcli.models.registry import load_registry
from sdcli.request.schema import parse_request
from sdcli.training import memory
from sdcli.training.config_files import settings_from
from sdcli.training.controlnet.settings import ControlNetSettings
from sdcli.training.controlnet.task import ControlNetTask
from sdcli.training.events import CheckpointSaved, RunNote, SamplesSaved, ValidationMetrics
from sdcli.training.task import Draw
from tests.conftest import Run
from tests.training_runs import captioned_images, controlnet_session, same_checkpoint, train_controlnet

SIZES = ((64, 64), (96, 64), (80, 72))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return captioned_images(tmp_path / "pictures", sizes=SIZES)


@pytest.fixture
def maps(tmp_path: Path, images: Path) -> Path:
    """Under the images' names, with another suffix: their edges."""
    folder = tmp_path / "maps"
    folder.mkdir()
    for image in images.glob("*.png"):
        with Image.open(image) as opened:
            control_map(opened.convert("RGB"), "softedge", None).save(folder / f"{image.stem}.webp", lossless=True)
    return folder


def copied(images: Path, folder: Path) -> Path:
    """The images without their captions."""
    return shutil.copytree(images, folder, ignore=shutil.ignore_patterns("*.txt"))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def setup(data: Path, run: Path, **changes: Any) -> ControlNetTask:
    session = controlnet_session(data, run, **changes)
    with session:
        list(session.prepare(resume=False))
        task = session.setup.task
        assert isinstance(task, ControlNetTask)
        return task


VARIANTS: dict[str, dict[str, Any]] = {
    "maps of the images": {"preprocessor": "softedge", "random_flip": True},
    "maps of a folder, an average, accumulation": {
        "conditioning_data_dir": "maps",
        "use_ema": True,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 1,
    },
    "random crops in half precision": {
        "conditioning_data_dir": "maps",
        "random_crop": True,
        "enable_bucket": True,
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        "dataloader_num_workers": 1,
    },
}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] * ("half" in name)) for name in VARIANTS]
)
@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path, images: Path, maps: Path, variant: str) -> None:
    changes = {**VARIANTS[variant], "validation_split": 0.0}
    changes |= {"conditioning_data_dir": str(maps)} if "conditioning_data_dir" in changes else {}
    train_controlnet(images, tmp_path / "straight", max_train_steps=4, checkpointing_steps=2, **changes)
    train_controlnet(images, tmp_path / "cut", max_train_steps=2, **changes)
    train_controlnet(images, tmp_path / "cut", max_train_steps=4, resume=True, **changes)
    assert same_checkpoint(tmp_path / "straight" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    assert not same_checkpoint(tmp_path / "straight" / "checkpoint-4", tmp_path / "straight" / "checkpoint-2")


@pytest.mark.slow
def test_before_the_first_step_the_unet_speaks_alone(tmp_path: Path, images: Path) -> None:
    task = setup(images, tmp_path / "run", preprocessor="softedge")
    batch = task.collate([task.item(draw) for draw in task.draws(0)])
    with torch.no_grad():
        guided = task.predicted(task.networks, batch["noise"], batch)
        condition = task.conditioning_arguments(task.networks, batch)
        assert torch.equal(guided, task.unet(batch["noise"], batch["t"], **condition, return_dict=False)[0])
        torch.nn.init.ones_(task.networks["controlnet"].controlnet_mid_block.bias)
        assert not torch.equal(task.predicted(task.networks, batch["noise"], batch), guided)


@pytest.mark.slow
def test_run_is_a_controlnet_for_sdcli_and_for_diffusers(tmp_path: Path, images: Path) -> None:
    run, tiny = tmp_path / "run", load_registry().find("tiny")
    before = load_model(tiny, device="cpu").unet.state_dict()
    events = train_controlnet(
        images,
        run,
        preprocessor="softedge",
        max_train_steps=4,
        learning_rate=1e-2,
        use_ema=True,
        sample_every_n_steps=4,
        sample_steps=2,
        validation_split=0.4,
        validation_steps=4,
    )
    averaged = weights_of(run / "checkpoint-4" / "controlnet_ema")
    theirs = ControlNetModel.from_pretrained(run / "controlnet").state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in averaged.items())
    raw = ControlNetModel.from_pretrained(run / "raw" / "controlnet").state_dict()
    assert not torch.equal(raw["conv_in.weight"], averaged["conv_in.weight"])
    model = load_model(tiny, device="cpu")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.unet.state_dict().items())
    trained = load_controlnet(load_registry().find_controlnet(str(run)), model)
    own = Pipeline.of(with_controlnets(model, {str(run): trained}))
    latents = []
    for image in ("0.png", "1.png", None):
        controls = {"controls": f"softedge:{run}={images / image}"} if image else {}
        *_, last = sample(own, [resolve(parse_request({"prompt": "a", "seed": 1, "steps": 2, **controls}), tiny)])
        latents.append(last.latents)
    assert not torch.equal(latents[0], latents[1])  # it has learnt to look at the map
    assert not torch.equal(latents[0], latents[2])
    (figures,) = (event.figures for event in events if isinstance(event, ValidationMetrics))
    assert figures["loss"] > 0
    ((sheet,),) = (event.paths for event in events if isinstance(event, SamplesSaved))
    requests = json.loads(Image.open(sheet).text["sdcli-sheet"])["requests"]  # type: ignore[attr-defined]
    assert [one["controls"][0]["model"] for one in requests] == [str(run)] * 2
    shown = Image.open(run / "samples" / "map-0.png")
    assert (shown.size, np.asarray(shown).max()) == ((64, 64), 255)


@pytest.mark.slow
def test_a_run_begins_where_another_controlnet_is(tmp_path: Path, images: Path) -> None:
    train_controlnet(images, tmp_path / "one", preprocessor="softedge", max_train_steps=1, learning_rate=1e-2)
    task = setup(images, tmp_path / "two", preprocessor="blur", controlnet=str(tmp_path / "one"))
    begun = weights_of(tmp_path / "one" / "controlnet")
    assert all(torch.equal(begun[name], tensor) for name, tensor in task.networks["controlnet"].state_dict().items())
    assert all(parameter.requires_grad for parameter in task.networks["controlnet"].parameters())


@pytest.mark.slow
def test_maps_are_cut_and_mirrored_as_their_images(tmp_path: Path, images: Path) -> None:
    """Copies of the images as maps: then each sample's map is its image."""
    copied(images, tmp_path / "copies")
    changes = {"random_crop": True, "random_flip": True, "resolution": "64", "validation_split": 0.0}
    task = setup(images, tmp_path / "run", conditioning_data_dir=str(tmp_path / "copies"), **changes)
    items = [task.item(draw) for step in range(4) for draw in task.draws(step)]
    assert all(torch.equal(item["map"], item["pixels"]) for item in items)
    edges = setup(images, tmp_path / "run", preprocessor="softedge", **changes)
    item = edges.item(Draw(1, 5, (64, 64)))
    assert torch.equal(item["map"], to_pixels(control_map(from_pixels(item["pixels"]), "softedge", (64, 64))))


@pytest.mark.slow
def test_a_frozen_unet_keeps_less_for_the_backward_pass_than_a_trained_one(tmp_path: Path, images: Path) -> None:
    task = setup(images, tmp_path / "run", preprocessor="blur")
    settings = settings_from(ControlNetSettings, {"preprocessor": "blur"})
    kept = memory.controlnet_memory(task, settings, size=(64, 64)).activations
    task.unet.requires_grad_(True)
    assert 0 < kept < memory.controlnet_memory(task, settings, size=(64, 64)).activations


@pytest.mark.slow
def test_unusable_maps_cost_their_images_alone(tmp_path: Path, images: Path, maps: Path) -> None:
    (maps / "1.webp").unlink()
    (maps / "2.webp").write_bytes(b"no image")
    events = train_controlnet(
        images, tmp_path / "run", conditioning_data_dir=str(maps), max_train_steps=1, validation_split=0.0
    )
    told = [event.text for event in events if isinstance(event, RunNote)]
    assert "dropped 1.png: has no map" in told
    assert any(text.startswith("dropped 2.png: its map ") for text in told)
    manifest = json.loads(
        (next(e.path for e in events if isinstance(e, CheckpointSaved)) / "manifest.json").read_text()
    )
    assert manifest["facts"]["pictures"] == 4
    with pytest.raises(UsageError, match=r"no image of .* has a usable map"):
        setup(images, tmp_path / "other", conditioning_data_dir=str(captioned_images(tmp_path / "x" / "y").parent))


@pytest.mark.slow
def test_a_run_on_other_maps_is_not_resumed(tmp_path: Path, images: Path, maps: Path) -> None:
    given = {"conditioning_data_dir": str(maps), "max_train_steps": 1, "validation_split": 0.0}
    train_controlnet(images, tmp_path / "run", **given)
    Image.new("RGB", (64, 64), "red").save(maps / "0.webp")
    with pytest.raises(UsageError, match="changed since the run started"):
        train_controlnet(images, tmp_path / "run", resume=True, **{**given, "max_train_steps": 2})


# Pairs


def test_maps_inside_the_data_are_no_images_themselves(tmp_path: Path) -> None:
    captioned_images(tmp_path / "data", count=3)
    captioned_images(tmp_path / "data" / "maps", count=2)
    images, maps = with_maps_of_folder(open_images(tmp_path / "data"), str(tmp_path / "data" / "maps"))
    assert [images[index].name for index in range(len(images))] == ["0.png", "1.png", "2.png"]
    assert maps.places.tolist() == [0, 1, -1]
    assert maps.read(1) == (tmp_path / "data" / "maps" / "1.png").read_bytes()
    (tmp_path / "data" / "metadata.jsonl").write_text("".join(f'{{"file_name": "{n}.png"}}\n' for n in range(3)))
    listed, _ = with_maps_of_folder(open_images(tmp_path / "data"), str(tmp_path / "data" / "maps"))
    assert (len(listed), listed.dropped) == (3, ())


def test_a_column_of_a_table_names_the_maps(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for folder in ("pictures", "maps"):
        captioned_images(data / folder, count=3)
        for caption in (data / folder).glob("*.txt"):
            caption.unlink()
    rows = [
        {"file_name": f"pictures/{n}.png", "text": f"number {n}", "conditioning_image": f"maps/{2 - n}.png"}
        for n in range(3)
    ]
    rows[1]["conditioning_image"] = "../../elsewhere.png"
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"data": str(data), "image_column": None, "split": "train"}
    images, maps = with_maps_of_column(open_images(data), None, **given)  # type: ignore[arg-type]
    assert [images[index].name for index in range(len(images))] == [f"pictures/{n}.png" for n in range(3)]
    assert maps[0].name == "maps/2.png"
    assert maps[2].name == "maps/0.png"
    assert maps.places[1] == -1
    assert [one.name for one in images.dropped] == ["maps/1.png"]  # the others are maps, not lost images
    with pytest.raises(UsageError, match="no column 'edges'"):
        with_maps_of_column(open_images(data), "edges", **given)  # type: ignore[arg-type]


def test_an_image_whose_rows_name_different_maps_is_refused(tmp_path: Path) -> None:
    data = captioned_images(tmp_path / "data", count=3)
    for caption in data.glob("*.txt"):
        caption.unlink()

    def paired(*maps: str) -> str:
        rows = [{"file_name": "0.png", "text": f"row {n}", "conditioning_image": f} for n, f in enumerate(maps)]
        (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        images, found = with_maps_of_column(open_images(data), None, data=str(data), image_column=None, split="train")
        assert images[0].captions == ("row 0", "row 1")
        return found[0].name

    assert paired("1.png", "1.png") == "1.png"
    with pytest.raises(UsageError, match=r"metadata.jsonl names both 1.png and 2.png as conditioning_image of 0.png"):
        paired("1.png", "2.png")


def test_a_column_of_parquet_rows_holds_the_maps(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    captioned_images(tmp_path / "pictures", count=4)
    cells = [{"bytes": (tmp_path / "pictures" / f"{n}.png").read_bytes(), "path": None} for n in range(4)]
    table = {"image": cells, "conditioning_image": cells[::-1], "text": list("abcd")}
    (tmp_path / "data").mkdir()
    parquet.write_table(arrow.table(table), tmp_path / "data" / "train.parquet")
    images, maps = with_maps_of_column(
        open_images(tmp_path / "data"), None, data=str(tmp_path / "data"), image_column=None, split="train"
    )
    assert [maps.read(n) for n in range(4)] == [images.read(3 - n) for n in range(4)]


def test_what_leaves_the_maps_open_is_refused(tmp_path: Path, images: Path) -> None:
    listed = open_images(images)
    with pytest.raises(UsageError, match="names no conditioning images: there is no column 'conditioning_image'"):
        with_maps_of_column(listed, None, data=str(images), image_column=None, split="train")
    with pytest.raises(NotFound, match="there is no folder nowhere"):
        with_maps_of_folder(listed, "nowhere")
    with pytest.raises(UsageError, match="is the folder of the training images itself"):
        with_maps_of_folder(listed, str(images))
    Image.new("RGB", (8, 8)).save(images / "0.jpg")
    with pytest.raises(UsageError, match=r"holds both 0\.jpg and 0\.png, so the map of 0 is ambiguous"):
        with_maps_of_folder(listed, str(copied(images, tmp_path / "copy")))


REFUSED = [
    ({"preprocessor": "softedge", "conditioning_data_dir": "maps"}, "are both sources of maps"),
    ({"preprocessor": "none"}, "should be"),
    ({"preprocessor": "cany"}, "preprocessor"),
    ({"preprocessor": "softedge", "keep_tokens": 2}, "--keep-tokens has no effect without --shuffle-caption"),
]


@pytest.mark.parametrize(("changes", "problem"), REFUSED)
def test_settings_without_an_effect_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        settings_from(ControlNetSettings, changes)


def test_what_no_controlnet_can_be_trained_for_is_refused(tmp_path: Path, images: Path) -> None:
    with pytest.raises(UsageError, match=r"has a =, which .* could not parse"):
        setup(images, tmp_path / "a=b", preprocessor="softedge")


@pytest.mark.slow
def test_prove_resume_says_identical(tmp_path: Path, images: Path, sdcli: Run) -> None:
    line = ["train-controlnet", images, "-m", "tiny", "--preprocessor", "softedge", "--train-batch-size", "2"]
    done = sdcli(*line, "--prove-resume", "--cache-dir", tmp_path / "cache", "-q")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("identical")
