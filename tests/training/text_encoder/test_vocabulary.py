"""Captions from files of every kind, and the vocabulary that is learned from them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPTokenizer

from sdcli.encoders.tokenizer import END, START, ClipTokenizer, load_tokenizer
from sdcli.errors import NotFound, UsageError
from sdcli.io.files import PACKAGE
from sdcli.training.text_encoder.caption_files import Captions, read_captions
from sdcli.training.text_encoder.vocabulary import LETTERS, MIN_SIZE, save_tokenizer, train_vocabulary

WORDS = [
    "fox",
    "hare",
    "owl",
    "red",
    "blue",
    "small",
    "jumping",
    "sleeping",
    "naïve",
    "café",
    "東京",
    "o'clock",
    "12",
    "a",
]


def captions(count: int = 200, *, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 8))) for _ in range(count)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    save_tokenizer(train_vocabulary(captions(), size=600, max_length=24), folder)
    return folder


@cache
def tokenizers(folder: Path) -> tuple[ClipTokenizer, ClipTokenizer, CLIPTokenizer]:
    return (
        train_vocabulary(captions(), size=600, max_length=24),
        load_tokenizer(folder),
        CLIPTokenizer.from_pretrained(folder),
    )


@pytest.mark.slow
@settings(max_examples=300)
@given(text=st.text(max_size=120) | st.lists(st.sampled_from([*WORDS, START, END, "<|", "# v", "\x85"])).map(" ".join))
def test_the_vocabulary_its_files_and_transformers_give_the_same_ids(saved: Path, text: str) -> None:
    trained, loaded, oracle = tokenizers(saved)
    expected = oracle(text, padding="max_length", max_length=24, truncation=True).input_ids
    assert list(loaded(text).ids) == expected
    assert list(trained(text).ids) == expected
    assert oracle.model_max_length == loaded.max_length == 24


@settings(max_examples=200)
@given(text=st.text(min_size=1, max_size=20))
def test_no_text_is_lost(saved: Path, text: str) -> None:
    _, tokenizer, oracle = tokenizers(saved)
    ids = tokenizer.tokenizer.encode(text.replace("<", " "), add_special_tokens=False).ids
    assert tokenizer.end_id not in ids, "the end token stands for what is unknown"
    normal = tokenizer.tokenizer.normalizer.normalize_str(text.replace("<", " "))
    letters = "".join(oracle.convert_ids_to_tokens(ids)).replace("</w>", "")
    byte_of = dict(zip(LETTERS, _bytes_in_clips_order(), strict=True))
    assert bytes(byte_of[letter] for letter in letters) == normal.replace(" ", "").encode()


def _bytes_in_clips_order() -> list[int]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*printable, *(byte for byte in range(256) if byte not in printable)]


def test_it_is_laid_out_as_clips_own(saved: Path) -> None:
    vocabulary = json.loads((saved / "vocab.json").read_text(encoding="utf-8"))
    clip = json.loads((PACKAGE / "encoders/clip_tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"][
        "vocab"
    ]
    by_id = list(vocabulary)
    assert [vocabulary[token] for token in by_id] == list(range(len(by_id)))
    assert by_id[:512] == sorted(clip, key=clip.__getitem__)[:512]
    assert by_id[-2:] == [START, END]
    merges = (saved / "merges.txt").read_text(encoding="utf-8").split("\n")
    assert merges[0].startswith("#version")
    assert by_id[512:-2] == list(dict.fromkeys(merge.replace(" ", "") for merge in merges[1:-1]))


def test_frequent_words_become_one_token_and_the_size_is_kept() -> None:
    tokenizer = train_vocabulary(captions(), size=600, max_length=24)
    assert len(tokenizer.tokenizer.encode("jumping fox", add_special_tokens=False).ids) == 2
    sizes = [train_vocabulary(captions(), size=size, max_length=24).tokenizer.get_vocab_size() for size in (514, 530)]
    assert sizes == [514, 530]
    assert train_vocabulary(captions(), size=10_000, max_length=24).tokenizer.get_vocab_size() < 700
    assert train_vocabulary([], size=600, max_length=24).tokenizer.get_vocab_size() == MIN_SIZE


def test_it_depends_on_the_captions_and_not_on_their_order_or_the_process(tmp_path: Path) -> None:
    texts = captions()
    for number, order in enumerate((texts, sorted(texts), texts[::-1])):
        save_tokenizer(train_vocabulary(order, size=560, max_length=32), tmp_path / str(number))
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    program = (
        "import json, sys, pathlib; from sdcli.training.text_encoder.vocabulary import *;"
        "folder = pathlib.Path(sys.argv[1]);"
        "texts = json.loads((folder / 'texts.json').read_text());"
        "save_tokenizer(train_vocabulary(texts, size=560, max_length=32), folder / 'other')"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=PACKAGE.parent)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        assert len({(tmp_path / folder / name).read_bytes() for folder in ("0", "1", "2", "other")}) == 1, name


def test_captions_that_hold_control_tokens_teach_nothing_of_them() -> None:
    with_tokens = train_vocabulary([f"{text}{END}" for text in captions()], size=600, max_length=24)
    assert with_tokens.tokenizer.to_str() == train_vocabulary(captions(), size=600, max_length=24).tokenizer.to_str()


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["encoders/clip_tokenizer", "starter/tokenizer"])
def test_a_shipped_tokenizer_saved_again_gives_the_same_ids(tmp_path: Path, folder: str) -> None:
    first = load_tokenizer(PACKAGE / folder)
    save_tokenizer(first, tmp_path)
    again = load_tokenizer(tmp_path)
    oracle = CLIPTokenizer.from_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    for text in ("a photo of a cat", "it's 12 o'clock!!", "naïve café — 東京 🐎", f"{END} trick", ""):
        assert again(text) == first(text)
        length = first.max_length
        assert oracle(text, padding="max_length", max_length=length, truncation=True).input_ids == list(first(text).ids)


def test_a_tokenizer_with_words_of_its_own_keeps_them_and_its_padding(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    save_tokenizer(train_vocabulary(captions(), size=600, max_length=24), folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        record = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**record, "pad_token": "!"}))
    first = load_tokenizer(folder)
    first.tokenizer.add_tokens(["<my-cat>"])
    save_tokenizer(first, tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again("a <my-cat> jumping") == first("a <my-cat> jumping")
    assert again.pad_id == first.pad_id == 0


@pytest.mark.parametrize(("size", "length"), [(513, 24), (600, 2), (600, 78)])
def test_a_vocabulary_that_cannot_be_is_refused(size: int, length: int) -> None:
    with pytest.raises(UsageError, match=r"at least 514|3 to 77"):
        train_vocabulary(["a fox"], size=size, max_length=length)


def test_learning_a_vocabulary_leaves_no_warning_for_forks() -> None:
    program = (
        "import os; from sdcli.training.text_encoder.vocabulary import train_vocabulary;"
        "train_vocabulary(['a fox'] * 9, size=600, max_length=24); pid = os.fork() or os._exit(0); os.waitpid(pid, 0)"
    )
    clean = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    ran = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, env=clean, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


# Captions


def meanings(found: Captions) -> list[set[str]]:
    groups: dict[int, set[str]] = {}
    for text, group in zip(found.texts, found.groups, strict=True):
        groups.setdefault(group, set()).add(text)
    return [groups[number] for number in range(len(groups))]


def test_a_text_file_has_one_caption_a_line(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_bytes(
        "\ufeffa red fox\r\n\n  a hare \n".encode() + b"broken \xff line\n# a fox\n" + END.encode() + b" no\n"
    )
    found = read_captions(path)
    assert found.texts == ("a red fox", "a hare", "# a fox")
    assert found.groups == (0, 1, 2)
    assert not found.has_alternatives
    assert [entry.name for entry in found.dropped] == ["captions.txt line 4", "captions.txt line 6"]
    assert "not UTF-8" in found.dropped[0].reason
    assert "mark the start and end of texts" in found.dropped[1].reason


def test_a_json_file_has_alternatives_as_lists_and_as_lines_of_one_image(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    lines = [
        '{"text": ["a fox", "a red fox", "a fox", ""]}',
        '{"caption": "an owl", "file_name": "1.png"}',
        "not json",
        '{"text": "a hare"}',
        '["a list"]',
        '{"caption": "a night bird", "file_name": "1.png"}',
        '{"other": 1}',
        '{"text": 7}',
        '{"text": "half \\ud800"}',
        "[" * 100_000,
    ]
    path.write_text("\n".join(lines))
    found = read_captions(path)
    assert meanings(found) == [{"a fox", "a red fox"}, {"an owl", "a night bird"}, {"a hare"}]
    assert found.has_alternatives
    assert list(found.groups) == sorted(found.groups)
    assert [entry.name.rpartition(" ")[2] for entry in found.dropped] == ["3", "5", "7", "8", "9", "10"]


def test_a_spreadsheet_has_alternatives_as_rows_of_one_image(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    rows = [
        "image,caption",
        "1.jpg,a fox",
        '1.jpg,"a red, small fox"',
        "2.jpg,an owl, and more",
        "2.jpg",
        "3.jpg,a hare",
    ]
    path.write_bytes("\r\n".join(rows).encode() + b"\r\n4.jpg,\xff\r\n5.jpg," + b"x" * 2**21 + b"\r\n6.jpg,an owl\r\n")
    found = read_captions(path)
    assert meanings(found) == [{"a fox", "a red, small fox"}, {"a hare"}, {"an owl"}]
    assert len(found.dropped) == 4
    assert meanings(read_captions(path, caption_column="image"))[0] == {"1.jpg"}
    with pytest.raises(UsageError, match="no column 'texts'"):
        read_captions(path, caption_column="texts")


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view"])
def test_rows_of_one_image_are_alternatives_whatever_the_type_of_its_column(tmp_path: Path, kind: str) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = arrow.array(["1.jpg", "2.jpg", "1.jpg"]).cast(getattr(arrow, kind)())
    table = arrow.table({"file_name": images, "text": ["a fox", "an owl", "a red fox"]})
    parquet.write_table(table, tmp_path / "captions.parquet")
    assert meanings(read_captions(tmp_path / "captions.parquet")) == [{"a fox", "a red fox"}, {"an owl"}]


def test_a_file_of_captions_has_no_split_but_the_one_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("captions.txt", "test.txt"):
        (tmp_path / "texts" / name).write_text("a fox\n")
    for name, split in (("captions", "train"), ("captions", "all"), ("test", "train"), ("test", "test")):
        assert read_captions(tmp_path / "texts" / f"{name}.txt", split=split).texts == ("a fox",)
    with pytest.raises(UsageError, match=r"captions.txt has no split 'test'; it has train \(--split\)"):
        read_captions(tmp_path / "texts" / "captions.txt", split="test")


def test_a_parquet_file_may_hold_texts_or_lists(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "captions.parquet"
    lists = [["a fox", "a red fox"], [], None, ["a hare"]]
    parquet.write_table(arrow.table({"text": lists, "image": [{"bytes": b"", "path": "x"}] * 4}), path)
    found = read_captions(path)
    assert meanings(found) == [{"a fox", "a red fox"}, {"a hare"}]
    assert [entry.name for entry in found.dropped] == ["captions.parquet row 2", "captions.parquet row 3"]
    names = ["1", "1", "2"]
    parquet.write_table(arrow.table({"words": ["a", "b", "c"], "file_name": names}), path, row_group_size=1)
    assert meanings(read_captions(path, caption_column="words")) == [{"a", "b"}, {"c"}]
    data = bytearray(path.read_bytes())
    data[4:40] = b"\xff" * 36
    path.write_bytes(data)
    damaged = read_captions(path, caption_column="words")
    assert damaged.texts == ("b", "c")
    assert "damaged" in damaged.dropped[0].reason
    path.write_bytes(data[:-20])
    with pytest.raises(UsageError, match="is not a readable parquet file"):
        read_captions(path, caption_column="words")


def test_a_folder_of_captioned_images_is_a_source_of_captions(tmp_path: Path) -> None:
    for name, text in (("a", "a fox\na red fox"), ("b", "an owl")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text)
    Image.new("RGB", (8, 8)).save(tmp_path / "without.png")
    found = read_captions(tmp_path)
    assert meanings(found) == [{"a fox", "a red fox"}, {"an owl"}]
    assert [entry.name for entry in found.dropped] == ["without.png"]


def test_no_captions_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no\\.txt"):
        read_captions(tmp_path / "no.txt")
    with pytest.raises(NotFound, match=r"no\.parquet"):
        read_captions(tmp_path / "no.parquet")
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UsageError, match="has no captions"):
        read_captions(tmp_path / "empty.txt")
    (tmp_path / "broken.jsonl").write_text("nonsense")
    with pytest.raises(
        UsageError, match=r"no captions \(1 dropped; first broken\.jsonl line 1: is not a JSON object \("
    ):
        read_captions(tmp_path / "broken.jsonl")
    (tmp_path / "captions.docx").write_text("a fox")
    with pytest.raises(UsageError, match="not a file of captions"):
        read_captions(tmp_path / "captions.docx")
