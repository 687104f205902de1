"""File names: any text that a person types becomes a file whose name is printed, or one sentence."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sdcli.cli.ui.console import Console
from sdcli.errors import CannotWrite, SdcliError, UsageError
from sdcli.generation.filenames import OTHER_FORMATS, check_template, image_name, output_settings
from sdcli.images.formats import FORMAT_OF, SUFFIX_OF
from sdcli.io.files import numbered

VALUES: dict[str, Any] = {
    "index": 1, "seed": 7, "prompt": "a red fox", "model": "tiny", "width": 64, "height": 48, "steps": 2,
    "guidance_scale": 7.5, "scheduler": "ddim", "custom_id": "none",
}  # fmt: skip
PARTS = ["{seed}", "{prompt}", "{index:05}", ".png", ".JPG", ".gif", "/", "..", ".", "-", "~", " ", "\\", "\n", "\x1b",
         "\u200d", "\u202e", "狐", "\udce9", "con", "x" * 300, "é" * 150, "{", "}", "{{a}}", ":", "*", "a"]  # fmt: skip
NAMES = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=5).map("".join),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30),
    st.binary(max_size=20).map(lambda data: os.fsdecode(data.replace(b"\0", b""))),
)
"""What a shell can hand over as a name."""


def written(name: str, folder: Path | None) -> Path:
    """The file that an image with this -o becomes, as the writer makes it. Raises SdcliError."""
    output = output_settings(name, folder, None)
    assert output.format in SUFFIX_OF
    place = image_name(output.template, VALUES, suffix=SUFFIX_OF[output.format])
    path = output.outdir / numbered(place, 1)
    assert FORMAT_OF[path.suffix.lower()] == output.format
    assert len(os.fsencode(path.name)) < 255
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:  # `whole_file` and `check_folder` make the same sentence of it
        raise CannotWrite(f"cannot write {path}: {error.strerror}") from None
    return path


def printed(path: Path) -> bytes:
    """What a program behind a pipe reads."""
    before, file = sys.stdout, io.BytesIO()
    sys.stdout = io.TextIOWrapper(file, encoding="ascii", errors="backslashreplace")
    try:
        Console().result(path)
        return file.getvalue()
    finally:
        sys.stdout = before


def a_file_or_a_sentence(name: str, *, inside: bool) -> None:
    with tempfile.TemporaryDirectory() as root:
        here = Path(root, "a", "b")
        here.mkdir(parents=True)
        before = os.getcwd()
        os.chdir(here)
        try:
            path = written(name, here / "out" if inside else None)
        except SdcliError:
            return
        finally:
            os.chdir(before)
        assert not inside or (here / "out") in path.parents
        line = printed(path)
        assert line.endswith(b"\n")
        assert Path(here, os.fsdecode(line[:-1])).is_file()
        assert path.name.rpartition(".")[0]


def ordinary(name: str) -> bool:
    """Whether it stays below the folder where it is typed."""
    return not name.startswith(("/", "~")) and ".." not in name


@given(name=NAMES, inside=st.booleans())
@example(name=".", inside=False)
@example(name="{seed}/", inside=True)
@example(name="a/{prompt}/.png", inside=False)
@example(name="caf\udce9.png", inside=False)
@example(name="{seed}.JPG..", inside=False)  # was a PNG image called .JPG
@settings(max_examples=100)
def test_any_name_becomes_a_file_with_the_name_that_is_printed_or_a_sentence(name: str, inside: bool) -> None:
    a_file_or_a_sentence(name, inside=inside or not ordinary(name))


@pytest.mark.slow
@given(name=NAMES, inside=st.booleans())
@settings(max_examples=2000, suppress_health_check=list(HealthCheck))
def test_thousands_of_names_become_files_or_sentences(name: str, inside: bool) -> None:
    a_file_or_a_sentence(name, inside=inside or not ordinary(name))


@pytest.mark.parametrize("suffix", sorted(OTHER_FORMATS))
def test_a_name_of_another_kind_of_file_is_refused(suffix: str) -> None:
    with pytest.raises(UsageError, match=f"-o names a {suffix} file, but images are written as .png, .jpg"):
        output_settings(f"fox{suffix.upper()}", None, None)


@pytest.mark.parametrize(
    ("name", "file"),
    [("fox", "fox.png"), ("v1.5", "v1.5.png"), ("a.b.webp", "a.b.webp"), ("fox.JPG", "fox.JPG"), ("-x.png", "-x.png"),
     ("a*b?.png", "a-b-.png"), ("con.png", "_con.png"), ("狐.png", "狐.png"), ("x" * 300, "x" * 200 + ".png")],
)  # fmt: skip
def test_names_as_they_become_files(name: str, file: str) -> None:
    output = output_settings(name, None, None)
    assert str(image_name(output.template, VALUES, suffix=SUFFIX_OF[output.format])) == file


@pytest.mark.parametrize("name", ["", ".", "..", "dir/", "dir/.", "a/..", "/"])
def test_a_folder_is_no_name(name: str) -> None:
    with pytest.raises(UsageError, match="names a folder, not a file"):
        output_settings(name, None, None)


def test_stdout_is_no_file() -> None:
    with pytest.raises(UsageError, match="-o - would mean stdout"):
        output_settings("-", None, None)


@pytest.mark.parametrize("name", ["a\\b.png", "a\nb", "\x1b[31m", "\x7f"])
def test_backslashes_and_control_characters_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="which no file name here may have"):
        check_template(name)
