"""Run every command of docs/cookbook.md in a folder of its own, so that the page shows what they really generate.

    python scripts/make_cookbook.py [FOLDER]

FOLDER must not exist; by default it is docs/cookbook, which is deleted first. Files that the page does not show are
removed at the end. The exit code is that of the first command that fails, or 1 if the page shows an image that no
command wrote.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "cookbook.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    folder = parser.parse_args().folder
    if folder is None:
        folder = DOCS / "cookbook"
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    draw_mask(folder / "mask.png")
    for command in commands():
        print("$", shlex.join(command), flush=True)
        code = subprocess.run([sys.executable, "-m", *command], cwd=folder, check=False).returncode
        if code:
            sys.exit(code)
    missing = [name for name in images() if not (folder / name).is_file()]
    if missing:
        sys.exit(f"no command wrote these images of the page: {', '.join(missing)}")
    shown = {folder / name for name in images()}
    for path in folder.rglob("*"):
        if path.is_file() and path not in shown:
            path.unlink()


def commands() -> list[list[str]]:
    """The commands of the page, in its order."""
    return [shlex.split(line[2:]) for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("$ ")]


def images() -> list[str]:
    """The images that the page shows, relative to the folder."""
    return re.findall(r"!\[\]\(cookbook/([^)]+)\)", PAGE.read_text(encoding="utf-8"))


def draw_mask(path: Path) -> None:
    """White with a black disc in the middle."""
    mask = Image.new("L", (256, 256), 255)
    ImageDraw.Draw(mask).ellipse((28, 28, 228, 228), fill=0)
    mask.save(path)


if __name__ == "__main__":
    main()
