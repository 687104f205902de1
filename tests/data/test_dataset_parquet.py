"""Parquet files as Hugging Face's datasets writes them: local, streamed through fsspec, and found on the hub."""

from __future__ import annotations

import builtins
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from sdcli.data import hub_datasets, parquet
from sdcli.data.hub_datasets import HUB_DATA, open_hub
from sdcli.data.parquet import ParquetRows, open_rows
from sdcli.data.records import ImageSet
from sdcli.data.sources import open_images
from sdcli.errors import BadImage, Interrupted, NotFound, Offline, UsageError
from tests.data.test_dataset_folders import dropped, folder_of, image_bytes, listed

IMAGES = [image_bytes(number) for number in range(7)]


def hf_dataset(**columns: Any) -> Dataset:
    """Seven images, made and written by the datasets library itself: the oracle."""
    features = Features(
        {
            "image": Image(),
            "label": ClassLabel(names=["dog", "cat"]),
            **{
                name: Sequence(Value("string")) if isinstance(v[0], list) else Value("string")
                for name, v in columns.items()
            },
        }
    )
    cells = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(IMAGES)]
    return Dataset.from_dict({"image": cells, "label": [0, 1, 0, 1, 0, 1, -1], **columns}, features=features)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two files of a train split with small row groups, and a test split."""
    (tmp_path / "data").mkdir()
    whole = hf_dataset(text=[f"caption {n}" for n in range(7)])
    for number in range(2):
        whole.shard(2, number, contiguous=True).to_parquet(
            tmp_path / f"data/train-0000{number}-of-00002.parquet", batch_size=2
        )
    whole.select(range(2)).to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    return tmp_path


def pyarrow_rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def test_rows_are_those_of_the_datasets_library(data: Path) -> None:
    images = pickle.loads(pickle.dumps(open_images(data)))
    assert images.streamed
    assert images.classes == ("cat", "dog")
    assert [item.captions for item in images] == [(f"caption {n}",) for n in range(7)]
    assert [item.label for item in images] == ["dog", "cat", "dog", "cat", "dog", "cat", None]
    assert [item.block for item in images] == [0, 0, 1, 1, 2, 2, 3]
    assert images[6].name == "data/train-00001-of-00002.parquet:2"
    assert [images.read(index) for index in (5, 0, 6, 3)] == [IMAGES[index] for index in (5, 0, 6, 3)]
    assert len({images.stamp(index) for index in range(7)}) == 7


def test_a_single_file_and_a_pattern_stand_for_themselves(data: Path) -> None:
    assert len(open_images(data, split="test")) == 2
    assert len(open_images(data, split="all")) == 9
    assert len(open_images(data / "data/test-00000-of-00001.parquet")) == 2
    assert listed(f"{data}/data/train-*.parquet")[3][0] == "train-00000-of-00002.parquet:3"
    assert len(listed(f"{data}/data/train-{{00000..00001}}-of-00002.parquet")) == 7
    with pytest.raises(UsageError, match="no split 'validation'; it has test, train"):
        open_images(data, split="validation")


def test_captions_may_be_lists_and_columns_of_any_name(tmp_path: Path) -> None:
    columns = {"long": [["a", "b"]] * 6 + [[]], "caption": ["c"] * 7}
    hf_dataset(**columns).rename_column("image", "photo").to_parquet(tmp_path / "x.parquet")
    assert listed(tmp_path)[0][1] == ("c",)
    assert [captions for _, captions, _ in listed(tmp_path, caption_column="long")] == [("a", "b")] * 6 + [()]
    with pytest.raises(UsageError, match=r"no column 'foto' \(--image-column\); did you mean 'photo'"):
        open_images(tmp_path, image_column="foto")
    with pytest.raises(UsageError, match="'label' holds int64, not the bytes of images"):
        open_images(tmp_path, image_column="label")


def test_of_several_columns_of_images_the_usual_name_comes_first(tmp_path: Path) -> None:
    cells = [{"bytes": data, "path": None} for data in IMAGES]
    columns = {"conditioning_image": cells[::-1], "image": cells, "text": list("abcdefg")}
    features = Features({"conditioning_image": Image(), "image": Image(), "text": Value("string")})
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "x.parquet")
    images = open_images(tmp_path)
    assert [images.read(index) for index in range(7)] == IMAGES
    (remark,) = images.remarks
    assert "has images in image and conditioning_image; image is used" in remark.text
    chosen = open_images(tmp_path, image_column="conditioning_image")
    assert (chosen.read(0), chosen.remarks) == (IMAGES[-1], ())


def test_a_parquet_table_beside_images_names_their_classes(tmp_path: Path) -> None:
    folder_of(tmp_path, {f"{number}.png": IMAGES[number] for number in range(4)})
    features = Features({"file_name": Value("string"), "label": ClassLabel(names=["dog", "cat"])})
    rows = {"file_name": [f"{number}.png" for number in range(4)], "label": [0, 1, 0, -1]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "metadata.parquet")
    assert [label for _, _, label in listed(tmp_path)] == ["dog", "cat", "dog", None]
    table = pq.read_table(tmp_path / "metadata.parquet")
    beyond = table.set_column(1, table.schema.field("label"), [[0, 1, 2, -1]])
    pq.write_table(beyond, tmp_path / "metadata.parquet")
    assert dropped(tmp_path)["2.png"].startswith("its label is 2, but there are only 2 classes")


def test_labels_without_captions_are_the_captions(tmp_path: Path) -> None:
    hf_dataset().to_parquet(tmp_path / "x.parquet")
    assert [captions for _, captions, _ in listed(tmp_path)][:2] == [("dog",), ("cat",)]


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])]
)
def test_plain_bytes_are_images_too(tmp_path: Path, kind: pa.DataType) -> None:
    cells = [{"bytes": data, "path": None} if pa.types.is_struct(kind) else data for data in IMAGES]
    pq.write_table(pa.table({"jpg": pa.array(cells, kind), "text": [str(n) for n in range(7)]}), tmp_path / "x.parquet")
    images = open_images(tmp_path)
    assert [images.read(index) for index in range(7)] == IMAGES


def test_a_file_without_images_is_a_question_not_a_guess(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [b"x"], "b": [b"y"]}), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match=r"no column that is recognized as images \(it has a, b\)"):
        open_images(tmp_path)
    assert open_images(tmp_path, image_column="b").read(0) == b"y"


@pytest.mark.parametrize("typed", ["{root}/x.parquet", "x.parquet", "*.parquet", "../set/x.parquet"])
def test_rows_without_an_image_and_paths_out_of_the_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    cells = [
        {"bytes": None, "path": None}, None, {"bytes": None, "path": "in/a.png"}, {"bytes": None, "path": "../b.png"},
        {"bytes": None, "path": "/etc/passwd"}, {"bytes": b"", "path": ""},
    ]  # fmt: skip
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    root = folder_of(tmp_path / "set", {"x": b""})
    folder_of(tmp_path, {"b.png": IMAGES[0], "set/in/a.png": IMAGES[1]})
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), root / "x.parquet")
    monkeypatch.chdir(root)
    images = open_images(typed.format(root=root))
    assert images.read(2) == IMAGES[1]
    for index in (0, 1, 5):
        with pytest.raises(BadImage, match=rf"x.parquet:{index}: holds no image$"):
            images.read(index)
    for index in (3, 4):
        with pytest.raises(BadImage, match="only the path of one"):
            images.read(index)


def test_odd_cells_and_damaged_files_are_dropped_with_a_reason(tmp_path: Path, data: Path) -> None:
    table = pa.table({"image": IMAGES[:3], "label": [5, 0, 1], "text": [b"caf\xe9", b"fine", b"good"]})
    metadata = hf_dataset().data.table.schema.metadata or {}
    written = tmp_path / "labels.parquet"
    hf_dataset().to_parquet(written)
    metadata = pq.read_schema(written).metadata
    table = table.set_column(2, "text", pa.array(["x", "fine", "good"])).replace_schema_metadata(metadata)
    pq.write_table(table, written)
    whole = (data / "data/train-00001-of-00002.parquet").read_bytes()
    (data / "data/train-00001-of-00002.parquet").write_bytes(whole[:-9])
    assert len(listed(data)) == 4
    assert "is a parquet file that cannot be read" in dropped(data)["data/train-00001-of-00002.parquet"]
    assert dropped(written) == {"labels.parquet:0": "its label is 5, but there are only 2 classes"}
    assert len(listed(written)) == 2


def test_damage_inside_a_file_costs_its_own_row_group(data: Path) -> None:
    path = data / "data/train-00000-of-00002.parquet"
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    broken = bytearray(path.read_bytes())
    broken[start : start + 20] = b"\xff" * 20
    path.write_bytes(broken)
    images = open_images(data)
    assert len(images) == 7
    with pytest.raises(BadImage, match=r"parquet:0: cannot be read"):
        images.read(0)
    assert images.read(2) == IMAGES[2]


def test_a_row_group_is_read_once_while_it_is_held(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[str, int]] = []
    opened = parquet.open_parquet

    class Counting:
        def __init__(self, path: str) -> None:
            self._file, self._path = opened(path), path

        def read_row_group(self, group: int, columns: list[str]) -> Any:
            reads.append((self._path, group))
            return self._file.read_row_group(group, columns=columns)

    images = open_images(data)
    assert isinstance(images, ParquetRows)
    assert images.shuffle_window is not None
    assert images.shuffle_window > 1000
    monkeypatch.setattr(parquet, "open_parquet", Counting)
    for _ in range(3):
        for index in range(7):
            images.read(index)
    assert len(reads) == 4
    monkeypatch.setattr(parquet, "HELD_BYTES", 1)
    reads.clear()
    again = pickle.loads(pickle.dumps(images))
    for index in (0, 1, 2, 3, 0):
        again.read(index)
    assert len(reads) == 3


def test_many_threads_read_the_right_rows(data: Path) -> None:
    images = open_images(data)
    order = [(7 * n + n // 3) % 7 for n in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(images.read, order)) == [IMAGES[index] for index in order]


@dataclass(frozen=True)
class Bytes(TorchDataset[bytes]):
    """What a DataLoader's workers do."""

    images: ImageSet

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> bytes:
        return self.images.read(index)


@pytest.mark.parametrize("context", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_worker_processes_read_the_right_rows_after_their_parent_did(data: Path, context: str) -> None:
    images = open_images(data)
    assert images.read(0) == IMAGES[0]
    loader = DataLoader(Bytes(images), batch_size=None, num_workers=2, multiprocessing_context=context, timeout=60)
    assert list(loader) == IMAGES


def test_urls_are_streamed_through_fsspec(data: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in sorted((data / "data").glob("train-*")):
        memory.pipe(f"/repo@abc/{path.name}", path.read_bytes())
    urls = [f"memory://{name}" for name in sorted(memory.ls("/repo@abc", detail=False))]
    images = open_rows(urls, names=["a", "b"], source="owner/name", stamps=urls, remote=True)
    assert images[4].name == "b:0"
    assert images.read(4) == IMAGES[4]
    assert images.stamp(4) == f"{urls[1]}:0:0"


def test_class_names_may_come_from_the_data_sets_card(tmp_path: Path) -> None:
    path = str(tmp_path / "x.parquet")
    pq.write_table(pa.table({"image": IMAGES[:3], "label": [1, 0, -1]}), path)
    features = {"label": {"_type": "ClassLabel", "names": ["dog", "cat"]}}
    images = open_rows([path], names=["x"], source="x", stamps=[""], features=features)
    assert [item.label for item in images] == ["cat", "dog", None]
    assert [label for *_, label in listed(path)] == ["1", "0", "-1"]


def test_a_failing_network_is_tried_again_and_is_no_broken_image(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [f"file://{path}" for path in sorted((data / "data").glob("train-*"))]
    images = open_rows(files, names=["a", "b"], source="owner/name", stamps=files, remote=True)
    opened, failures = parquet.open_parquet, iter([True, True, False, True, True, True, True])
    pauses: list[float] = []

    def failing(path: str) -> Any:
        if next(failures):
            raise ConnectionResetError("reset")
        return opened(path)

    monkeypatch.setattr(parquet, "open_parquet", failing)
    monkeypatch.setattr("time.sleep", pauses.append)
    assert images.read(0) == IMAGES[0]
    assert pauses == [1.0, 4.0]
    with pytest.raises(Offline, match=r"b:0: cannot be fetched from .*: reset"):
        images.read(4)


# The hub


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub_datasets, "use_offline", lambda offline: None)


@pytest.fixture
def hub(online: None, monkeypatch: pytest.MonkeyPatch, data: Path) -> Iterator[list[tuple[Any, ...]]]:
    """The datasets library with its listing of the hub replaced by that of a local folder."""
    asked: list[tuple[Any, ...]] = []
    real = datasets.load_dataset_builder

    def local(path: str, name: str | None = None, *, revision: str | None = None) -> Any:
        asked.append((path, name, revision))
        return real(str(data))

    monkeypatch.setattr(datasets, "load_dataset_builder", local)
    return asked  # type: ignore[return-value]


def test_a_hub_id_is_resolved_by_the_datasets_library(hub: list[tuple[Any, ...]]) -> None:
    images = open_images("owner/name")
    assert hub == [("hf://datasets/owner/name", None, None)]
    assert [item.name for item in images][3:5] == ["train-00000-of-00002.parquet:3", "train-00001-of-00002.parquet:0"]  # type: ignore[attr-defined]
    assert [images.read(index) for index in range(7)] == IMAGES
    assert len(open_hub("owner/name:config@v1.0", split="test")) == 2
    assert hub[1:] == [("hf://datasets/owner/name", "config", "v1.0")]
    assert len(open_hub("owner/name", split="all")) == 9
    with pytest.raises(UsageError, match="owner/name has no split 'validation'; it has train, test"):
        open_hub("owner/name", split="validation")


def test_a_folder_wins_over_the_hub(
    hub: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path / "owner/name", {"a.png": IMAGES[0]})
    monkeypatch.chdir(tmp_path)
    assert open_images("owner/name").read(0) == IMAGES[0]
    assert not hub


def test_a_mistyped_path_is_not_looked_for_on_the_hub(
    hub: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path / "photos/cats", {"a.png": IMAGES[0]})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound, match=r"no folder or file photos/cat \(hf://datasets/photos/cat would be"):
        open_images("photos/cat")
    assert not hub
    assert len(open_images("hf://datasets/photos/cat")) == 7
    assert hub == [("hf://datasets/photos/cat", None, None)]


def test_other_formats_are_read_from_the_hubs_parquet_copy(
    hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parquet_builder = datasets.load_dataset_builder
    folder_of(tmp_path / "images", {"a.png": IMAGES[0]})

    def two(path: str, name: str | None = None, *, revision: str | None = None) -> Any:
        if revision == "refs/convert/parquet":
            return parquet_builder(path, name, revision=revision)
        return builder

    monkeypatch.undo()
    builder = datasets.load_dataset_builder(str(tmp_path / "images"))
    assert builder.name == "imagefolder"
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(datasets, "load_dataset_builder", two)
    assert len(open_hub("owner/name")) == 7
    with pytest.raises(UsageError, match=r"imagefolder instead of parquet files; .*`hf download owner/name"):
        open_hub("owner/name@main")


@pytest.mark.parametrize(
    ("raised", "error", "sentence"),
    [
        (datasets.exceptions.DatasetNotFoundError("gone"), NotFound, "neither a folder owner/name nor a data set"),
        (ConnectionError("no route"), Offline, "hub cannot be reached: no route"),
        (
            ValueError("BuilderConfig 'x' not found. Available: ['a', 'b']"),
            UsageError,
            "choose one with owner/name",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported"),
            NotFound,
            "cannot be read as a data set: Dataset scripts",
        ),
    ],
)
def test_what_the_hub_answers_becomes_a_sentence(
    online: None, monkeypatch: pytest.MonkeyPatch, raised: Exception, error: type[Exception], sentence: str
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset_builder", failing)
    with pytest.raises(error, match=sentence):
        open_images("owner/name")


def test_offline_is_a_sentence_and_no_wait() -> None:
    with pytest.raises(Offline, match=r"no folder owner/name.*HF_HUB_OFFLINE forbids \(`hf download owner/name"):
        open_images("owner/name")


@pytest.mark.parametrize("missing", ["pyarrow", "datasets"])
def test_a_missing_package_is_told_with_what_to_install(
    online: None, data: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    imported = builtins.__import__

    def lacking(name: str, *arguments: Any, **named: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ImportError(name)
        return imported(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(UsageError, match=rf"package {missing}: pip install 'sdcli\[data\]'"):
        open_images(data if missing == "pyarrow" else "owner/name")


def test_ids_of_the_hub_are_told_from_paths() -> None:
    for data in ("owner/name", "owner/na.me-1_x", "o/n@main", "o/n@refs/pr/1", "o/n:config", "o/n:c@0123"):
        assert HUB_DATA.fullmatch(data)
    for data in ("./owner/name", "/owner/name", "name", "a/b/c", "~/x", "owner/name/", "../name"):
        assert not HUB_DATA.fullmatch(data)


@pytest.mark.parametrize("reason", [Interrupted, KeyboardInterrupt])
def test_an_interruption_is_never_taken_for_a_damaged_file(
    data: Path, monkeypatch: pytest.MonkeyPatch, reason: type[BaseException]
) -> None:
    """Neither while files are listed, where they would be dropped, nor while an image is read."""
    images = open_images(data)

    def interrupted(*_: object, **__: object) -> None:
        raise reason("stopped")

    monkeypatch.setattr(parquet, "open_parquet", interrupted)
    with pytest.raises(reason):
        open_images(data)
    with pytest.raises(reason):
        images.read(0)
