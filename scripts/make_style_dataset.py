#!/usr/bin/env python
"""Make a data set in one style for a LoRA: ten images of a captioned set, as white drawings on deep blue.

python scripts/make_emoji_dataset.py emoji --style fluent-emoji --size 128
python scripts/make_style_dataset.py emoji cyanotype
sdcli train-unet cyanotype -o lora --rank 16 --prompt-template "{prompt}"
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from PIL import Image, ImageOps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="a folder with metadata.jsonl, as written by make_emoji_dataset.py")
    parser.add_argument("out", type=Path, help="the folder to write; it must not exist")
    parser.add_argument("--count", type=int, default=10, help="number of images, spread over the set (%(default)s)")
    options = parser.parse_args()
    if options.out.exists():
        sys.exit(f"{options.out} exists already")
    rows = [json.loads(line) for line in (options.images / "metadata.jsonl").read_text().splitlines()]
    options.out.mkdir(parents=True)
    for row in rows[:: max(1, len(rows) // options.count)][: options.count]:
        image = Image.open(options.images / row["file_name"]).convert("RGB")
        name = Path(row["file_name"]).stem
        cyanotype(image).save(options.out / f"{name}.png")
        caption = row["text"][0] if isinstance(row["text"], list) else row["text"]
        (options.out / f"{name}.txt").write_text(f"{caption}, cyanotype style\n")


def cyanotype(image: Image.Image) -> Image.Image:
    """An image as a cyanotype (the photographic print): dark areas become white, light ones deep blue."""
    grey = ImageOps.autocontrast(ImageOps.grayscale(image))
    return ImageOps.colorize(grey, black=(255, 255, 255), mid=(120, 170, 225), white=(16, 42, 120))


if __name__ == "__main__":
    main()
